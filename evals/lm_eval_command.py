"""`python -m evals lm_eval`: the tasks of EleutherAI's lm-eval on a checkpoint of ours.

    python -m evals lm_eval hellaswag,gsm8k --checkpoint=runs/quickstart --limit 100

The flags here say what the model is; all others are those of `lm_eval` and go to it as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

OPTIONS = {
    "checkpoint": (str, "a run, a checkpoint folder, a Hugging Face folder, or hub:owner/name"),
    "dtype": (str, "of activations (default: float32 on a CPU, else bfloat16)"),
    "max-length": (int, "most tokens at once (default: the model's)"),
    "token-budget": (int, "tokens of a batch of scoring"),
    "mesh-data": (int, "devices of the mesh axis data"),
    "mesh-fsdp": (int, "devices of the mesh axis fsdp"),
    "mesh-tensor": (int, "devices of the mesh axis tensor"),
}
"""Flag -> its type and help; each is an argument of `evals.lm_eval.SheafLM` too."""


def run(arguments: Sequence[str]) -> None:
    """Run lm-eval's own command line with a checkpoint of ours as its model.

    Raises `ImportError` without lm-eval; what it refuses itself ends the program.
    """
    tasks, options, others = parse(arguments)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError("lm-eval is not installed: pip install 'sheaf[lm_eval]'") from error
    from evals.lm_eval import NAME, register

    register()
    model = ["--model", NAME, "--model_args", json.dumps(options)]
    sys.argv = ["lm_eval", "run", *model, *(["--tasks", tasks] if tasks else []), *others]
    cli_evaluate()


def parse(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any], list[str]]:
    """The tasks, what the model is, and the flags that are lm-eval's."""
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    parser = argparse.ArgumentParser(
        prog="python -m evals lm_eval",
        usage="%(prog)s TASK[,TASK] --checkpoint=A [flags of lm_eval]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag, (kind, text) in OPTIONS.items():
        parser.add_argument(f"--{flag}", type=kind, help=text, required=flag == "checkpoint")
    known, others = parser.parse_known_args(arguments[1:] if first else arguments)
    options = {name: value for name, value in vars(known).items() if value is not None}
    # The name that lm-eval looks for, to call its files by.
    return first, {"pretrained": options.pop("checkpoint"), **options}, others
