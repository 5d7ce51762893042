"""An evaluation small enough for a test, and a process that is killed in the middle of it.

python tests/tiny_evaluation.py FOLDER ANSWERS     dies by SIGKILL after so many answers
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from tiny_engine import CONFIG, SETTINGS, TOKENIZER, params_of

from evals import InProcess, Options, Store, build, evaluate
from model.checkpoint import Checkpoint

OPTIONS = Options(limit=40)


def checkpoint(name="tiny", scale=1.0):
    config = dataclasses.replace(CONFIG, max_length=96)
    params = params_of()
    params = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * scale}}
    return Checkpoint(config, params, TOKENIZER.files(), {}, Path(f"runs/{name}/checkpoints/1"))


def backend(kind=InProcess, name="tiny", scale=1.0, store=None, **options):
    settings = dataclasses.replace(SETTINGS, max_model_len=96, num_pages=60, page_widths=(24,))
    given = {"token_budget": 256, "engine": settings, **options}
    return kind(checkpoint(name, scale), store=store, **given)


def write_files(folder):
    """Documents of two domains, and questions."""
    rng = np.random.default_rng(0)
    letters = np.asarray(list("abcdefgh é\n"))
    documents = [
        {"text": "".join(rng.choice(letters, int(rng.integers(1, 200)))), "domain": "xy"[i % 2]}
        for i in range(40)
    ]
    questions = [
        {"id": f"q{i}", "question": f"{i} or {i + 1}?", "options": ["one", "a two", "3"],
         "answer": i % 3}
        for i in range(40)
    ]  # fmt: skip
    for name, rows in (("documents", documents), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def tasks(folder):
    given = {
        "perplexity.path": folder / "documents.jsonl",
        "perplexity.domain_key": "domain",
        "multiple_choice.path": folder / "questions.jsonl",
        "iq_head_tail.samples": 8,
    }
    return build(["perplexity", "multiple_choice", "iq_head_tail"], given)


class Dying(InProcess):
    """Ends its process after so many answers, as `kill -9` does."""

    left = 0

    def answer(self, requests, known):
        for group in super().answer(requests, known):
            yield group
            Dying.left -= len(group)
            if Dying.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, answers: int) -> None:
    Dying.left = answers
    with Store(folder / "killed") as store:
        doomed = backend(Dying, store=store)
    evaluate(doomed, tasks(folder), out=folder / "killed", options=OPTIONS, say=None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
