"""One side of `benchmarks/evals.py`: lm-eval with one model, a task for each line that it reads.

    python -m benchmarks.evals_worker FOLDER hf:16
    python -m benchmarks.evals_worker FOLDER sheaf

It answers with `{seconds, cpu_seconds, compiled, requests, answers, scores}`, a line each, of which
`compiled` counts programs of JAX. FOLDER holds `tasks.json`, the model as transformers reads it in
`hf/`, and in `checkpoint` where ours lies.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def main(folder: Path, side: str) -> None:
    """Load the model, then run what is asked for until there is no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is not an answer.
    warnings.simplefilter("ignore")
    tasks = json.loads((folder / "tasks.json").read_text())
    lm, compiled = model(folder, side), programs() if side == "sheaf" else []
    for line in sys.stdin:
        before = len(compiled)
        found = measure(lm, tasks[line.strip()])
        print(json.dumps({**found, "compiled": len(compiled) - before}), file=out, flush=True)


def programs() -> list[float]:
    """Seconds of each program that JAX compiles from now on."""
    from jax import monitoring

    found: list[float] = []

    def hear(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    monitoring.register_event_duration_secs_listener(hear)
    return found


def model(folder: Path, side: str) -> Any:
    """lm-eval's own model with a size of its batches, or ours."""
    kind, _, batch = side.partition(":")
    if kind == "sheaf":
        from evals.lm_eval import SheafLM

        return SheafLM((folder / "checkpoint").read_text(), dtype="float32")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder / "hf"), device="cpu", dtype="float32", batch_size=int(batch))


def measure(lm: Any, task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of lm-eval's whole evaluation of a task, and what came of it."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([task])
    began, busy = time.perf_counter(), time.process_time()
    found = evaluate(lm, loaded, bootstrap_iters=0)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - busy
    assert found is not None
    name = task["task"]
    rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
    answers = [one for row in rows for each in row["resps"] for one in each]
    scores = found["results"][name].items()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "requests": len(answers),
        "answers": answers,
        "scores": {key: value for key, value in scores if isinstance(value, float)},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
