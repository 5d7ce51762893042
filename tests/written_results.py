"""Folders of results without a model: rows that a test makes up, written as an evaluation does."""

from __future__ import annotations

import json
import math

from evals import Place, Task, proportion
from evals.results import write
from evals.runner import TaskResult
from evals.task import no_examples
from evals.tasks.perplexity import bits_per_byte
from model.checkpoint_folder import step_name

PLACE = Place("knowledge and capability", "question answering")
EVIL = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
)


def _task(name):
    return Task(name, "1", "none", PLACE, no_examples, lambda example, context: iter(()), dict)


def questions(right, name="questions", data="same"):
    """A task whose example i is right if `right[i]`; one prompt and one answer try to be markup."""
    rows = [
        {
            "id": f"q{i}",
            "gold": "blue",
            "parsed": "blue" if hit else "red",
            "outcome": "correct" if hit else "incorrect",
            "chance": 0.25,
            "prompt": EVIL if i == 1 else f"What colour is {i}?",
            "outputs": [{"texts": [f"{EVIL} {hit}"], "finish": ["length" if i == 2 else "stop"]}],
        }
        for i, hit in enumerate(right)
    ]
    estimates = {"acc": proportion([float(hit) for hit in right]), "acc/first": proportion([1.0])}
    return TaskResult(_task(name), estimates, rows, data, 0)


def documents(bits, name="perplexity"):
    """A task of documents of 100 bytes, with so many bits a byte each."""
    rows = [
        {
            "id": f"d{i}",
            "nats": each * 100 * math.log(2),
            "tokens": 50,
            "bytes": 100,
            "words": 20,
            "prompt": f"document {i}",
            "outputs": [{"logprob": -each, "tokens": 50, "bytes": 100, "words": 20}],
        }
        for i, each in enumerate(bits)
    ]
    return TaskResult(_task(name), {"bits_per_byte": bits_per_byte(rows)}, rows, "documents", 0)


def model(folder, results, bits=None, method="train"):
    facts = {"method": method, "bits_per_weight": bits}
    write(folder, {"name": folder.name, "facts": facts}, {"seed": 0}, results, {})
    return folder


def sweep(folder, by_step, incidents=()):
    """A sweep whose checkpoints gave these results."""
    points = []
    for step, results in by_step.items():
        model(folder / step_name(step), results)
        points.append({"step": step, "tokens": 1000 * step, "commit": "", "asked": {}})
    content = {"format": 1, "run": "made up", "points": points, "incidents": list(incidents)}
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder
