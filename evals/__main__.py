"""`python -m evals` measures checkpoints, servers and runs, and compares and shows the results.

    python -m evals run --checkpoint=A,B --tasks=perplexity,needle --out=OUT \\
        --perplexity.path=held_out.jsonl --needle.samples=5
    python -m evals sweep needle --run=runs/quickstart --out=SWEEP --follow
    python -m evals compare OUT/A OUT/B
    python -m evals report OUT/A OUT/B SWEEP --html=report.html
    python -m evals tasks
    python -m evals lm_eval TASKS --checkpoint=A    (tasks of EleutherAI's lm-eval)

`run` may be left out. A model is a run, a checkpoint folder, a Hugging Face folder,
hub:owner/name, or a server's address, http://…/v1. An evaluation that was stopped goes on when the
same command is given again.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

KEY_VARIABLE = "SHEAF_API_KEY"
LM_EVAL = "lm_eval"
AXES = ("data", "fsdp", "tensor")
SETTING = re.compile(r"--([\w@-]+\.\w+)=(.*)", flags=re.DOTALL)
TASKS_HELP = "names, with commas between; NAME@LABEL for a second of a kind"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for wrong input, 130 if interrupted."""
    from model.checkpoint_folder import CheckpointError
    from serving.client import ClientError

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == [LM_EVAL]:
            _lm_eval(given[1:])
        else:
            known, settings = parse(given)
            known.run(known, settings)
    except KeyboardInterrupt:
        print("python -m evals: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (CheckpointError, ClientError, ValueError, OSError, ImportError) as error:
        if os.environ.get("SHEAF_TRACEBACK"):
            raise
        print(f"python -m evals: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, str]]:
    """The known flags, and the tasks' settings, `--TASK.setting=value`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("--") and given[0] != "--help":
        given = ["run", *given]
    matches = [SETTING.fullmatch(each) for each in given]
    rest = [each for each, match in zip(given, matches, strict=True) if match is None]
    return _parser().parse_args(rest), {match[1]: match[2] for match in matches if match}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        required=True, metavar="{run,sweep,compare,report,tasks,lm_eval}"
    )
    run = commands.add_parser("run", help="evaluate models", allow_abbrev=False)
    run.set_defaults(run=_run)
    run.add_argument("--checkpoint", "--model", dest="models", required=True, type=_listed,
        metavar="A,B", help="models, with commas between")  # fmt: skip
    run.add_argument("--tasks", required=True, type=_listed, metavar="NAME,NAME", help=TASKS_HELP)
    _add_shared(run)
    sweep = commands.add_parser("sweep", help="every checkpoint of a run", allow_abbrev=False)
    sweep.set_defaults(run=_sweep)
    sweep.add_argument("tasks", type=_listed, metavar="NAME,NAME", help=TASKS_HELP)
    sweep.add_argument("--run", dest="folder", required=True, type=Path, help="the run's folder")
    sweep.add_argument("--follow", action="store_true",
        help="go on as checkpoints come, until the run's last step is measured")  # fmt: skip
    sweep.add_argument("--poll", type=float, default=10.0, metavar="SECONDS",
        help="between two looks for new ones (default: 10)")  # fmt: skip
    _add_shared(sweep)
    compare = commands.add_parser("compare", help="paired differences", allow_abbrev=False)
    compare.add_argument("folders", nargs=2, help="OUT/MODEL of two models")
    compare.set_defaults(run=_compare)
    report = commands.add_parser("report", help="tables, or a page", allow_abbrev=False)
    report.add_argument("folders", nargs="+", metavar="DIR",
        help="OUT/MODEL of a model, or the folder of a sweep; the first model is the one that "
             "others are held against")  # fmt: skip
    report.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page that opens from disk"
    )
    report.add_argument("--title", default="Evaluation", help="of the page")
    report.add_argument("--examples", type=int, default=500, metavar="N",
        help="examples of each task on the page at most (default: 500)")  # fmt: skip
    report.set_defaults(run=_report)
    tasks = commands.add_parser("tasks", help="the tasks and their settings", allow_abbrev=False)
    tasks.add_argument("--where", nargs="+", default=[], metavar="FIELD=VALUE",
        help="only tasks at this place: category=reasoning, evaluation=ME")  # fmt: skip
    tasks.set_defaults(run=_tasks)
    return parser


def _add_shared(command: argparse.ArgumentParser) -> None:
    """The flags of what evaluates."""
    add = command.add_argument
    add("--out", required=True, type=Path, help="the folder to write")
    add("--limit", type=int, help="examples of each task at most")
    add("--shots", "--fewshot", type=int, help="examples shown before a question")
    add("--shots-from", choices=("first", "random"), default="first",
        help="the first of the split, or random ones for each question")  # fmt: skip
    add("--seed", type=int, default=0, help="of all that is random (default: 0)")
    add("--chat", action="store_true", help="ask in messages, by the chat template")
    add("--judge", metavar="MODEL", help="who judges: a checkpoint, or a server's address")
    add("--allow-weaker-sandbox", action="store_true",
        help="run programs although this machine cannot isolate them fully")  # fmt: skip
    add("--dtype", help="of activations (default: float32 on a CPU, else bfloat16)")
    add("--max-length", type=int, help="most tokens at once (default: the model's)")
    add("--token-budget", type=int, help="tokens of a batch of scoring")
    for axis in AXES:
        add(f"--mesh-{axis}", type=int, help=f"devices of the mesh axis {axis}")


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _shared(known: argparse.Namespace, settings: dict[str, str]) -> dict[str, Any]:
    """The keyword arguments that `evaluate` and `sweep` share."""
    from evals.evaluation import open_backend
    from evals.execution import Sandboxed
    from evals.runner import Options

    key, roles = os.environ.get(KEY_VARIABLE), {}
    if known.judge:
        roles["judge"] = open_backend(known.judge, layout=_layout(known), api_key=key)
    if known.allow_weaker_sandbox:
        roles["sandbox"] = Sandboxed(allow_weaker=True)
    given = {name: getattr(known, name) for name in ("dtype", "max_length", "token_budget")}
    return {
        "out": known.out,
        "settings": settings,
        "options": Options(known.seed, known.limit, known.shots, known.shots_from, known.chat),
        "roles": roles,
        "layout": _layout(known),
        "say": lambda line: print(line, file=sys.stderr, flush=True),
        **{name: value for name, value in given.items() if value is not None},
    }


def _run(known: argparse.Namespace, settings: dict[str, str]) -> None:
    from evals.comparing import summary
    from evals.evaluation import evaluate

    key = os.environ.get(KEY_VARIABLE)
    found = evaluate(known.models, known.tasks, api_key=key, **_shared(known, settings))
    print(summary(found))
    if len(found) > 1:
        _compare_all([known.out / name for name in found])


def _sweep(known: argparse.Namespace, settings: dict[str, str]) -> None:
    from evals.curves import correlation_table, curves, matrix
    from evals.sweep import sweep

    watching = {"follow": known.follow, "poll": known.poll}
    sweep(known.folder, known.tasks, **watching, **_shared(known, settings))
    found = curves(known.out)
    print(matrix(found))
    if len(found) > 1:
        print(f"\n{correlation_table(found)}")


def _layout(known: argparse.Namespace):
    from evals.evaluation import mesh_layout

    return mesh_layout(**{axis: getattr(known, f"mesh_{axis}") for axis in AXES})


def _lm_eval(arguments: list[str]) -> None:
    from evals.lm_eval_command import run

    run(arguments)


def _compare_all(folders: list[Path]) -> None:
    from evals.comparing import compare_folders, table

    for other in folders[1:]:
        print(f"\n{other.name} against {folders[0].name}:\n")
        print(table(compare_folders(folders[0], other)))


def _compare(known: argparse.Namespace, settings: dict[str, str]) -> None:
    _no_settings(settings)
    _compare_all([Path(folder) for folder in known.folders])


def _report(known: argparse.Namespace, settings: dict[str, str]) -> None:
    from evals.comparing import summary
    from evals.report import collect, write_html

    _no_settings(settings)
    contents = collect(known.folders)
    if known.html is None:
        print(summary({model.label: model.results for model in contents.everyone}))
        return
    write_html(known.html, contents, title=known.title, examples=known.examples)
    print(f"{known.html}: {known.html.stat().st_size / 1e6:.2f} MB")


def _tasks(known: argparse.Namespace, settings: dict[str, str]) -> None:
    from evals.registry import TASKS, chosen, coverage, options, place_of

    _no_settings(settings)
    wrong = next((each for each in known.where if "=" not in each), None)
    if wrong is not None:
        raise ValueError(f"--where {wrong}: must be FIELD=VALUE, such as category=reasoning")
    names = chosen(dict(each.split("=", 1) for each in known.where))
    for name in names:
        title, place = (TASKS[name].__doc__ or "").partition("\n\n")[0], place_of(name)
        where = (place.group, place.category, place.subcategory)
        print(f"{name}\n    {' '.join(title.split())}\n    settings: {', '.join(options(name))}")
        print(f"    place: {', '.join(each for each in where if each)}")
    if not known.where:
        print(f"\n{coverage(names)}")


def _no_settings(settings: dict[str, str]) -> None:
    if settings:
        raise ValueError(
            f"--{next(iter(settings))} is a task's setting; only `run` and `sweep` take those"
        )


if __name__ == "__main__":
    sys.exit(main())
