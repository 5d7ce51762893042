"""What is remembered is told by where in the run it was read, and against text that was not."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny_evaluation

from data import build as build_data
from data.config import DataConfig, SourceConfig, TokenizerConfig
from evals import Generated, Store, build
from evals.runner import run

GIVEN, ASKED = 8, 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder that skipped batches 2 and 3, and what it read."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 300)) for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = DataConfig(
        sources=(SourceConfig(str(folder / "text.jsonl")),),
        tokenizer=TokenizerConfig(kind="bytes"),
        length=48, batch_size=4, validation_fraction=0.2, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"data": dataclasses.asdict(config)}))
    (folder / "order.json").write_text(json.dumps({"skips": [[2, 4]], "deferred": []}))
    return folder, build_data(config, say=lambda line: None)


class Remembering:
    """A model that has learnt some windows by heart, one of them but for its last token."""

    def __init__(self, windows):
        self.name, self.identity = "remembering", {"windows": len(windows)}
        self.known = {tuple(w[:GIVEN]): w[GIVEN : GIVEN + ASKED] for w in windows}
        self.known[tuple(windows[0][:GIVEN])] = [*windows[0][GIVEN : GIVEN + ASKED - 1], -1]

    def answer(self, requests, known):
        for place, request in enumerate(requests):
            assert (request.temperature, request.max_tokens) == (0.0, ASKED)
            ids = self.known.get(request.tokens, [-1] * ASKED)
            yield [(place, Generated(("said",), ("length",), ids=(tuple(ids),)))]

    def work(self):
        return {}

    def close(self):
        pass


def task_of(folder, **settings):
    given = {"path": folder, "prompt_tokens": GIVEN, "answer_tokens": ASKED, **settings}
    [task] = build(["memorisation"], {f"memorisation.{name}": v for name, v in given.items()})
    return task


def test_a_chunk_that_was_learnt_by_heart_stands_out(trained, tmp_path):
    folder, dataset = trained
    windows = dataset.train.batch_at(4)["tokens"].tolist()  # What step 2 read.
    task = task_of(folder, steps="0,2", samples=4)
    with Store(tmp_path) as store:
        [found] = run([task], {"subject": Remembering(windows)}, store)
    values = {name: each.value for name, each in found.estimates.items()}
    learnt = [row for row in found.rows if row["chunk"] == "2"]
    assert len(learnt) > 1
    assert values["memorised/2"] == pytest.approx(1 - 1 / ASKED / len(learnt))
    assert values["memorised/0"] == values["memorised/held_out"] == 0.0
    rows = [row for row in found.rows if row["chunk"] != "held_out"]
    assert values["full_match"] == pytest.approx((len(learnt) - 1) / len(rows))
    text = dataset.tokenizer.decode(windows[0][GIVEN : GIVEN + ASKED])
    assert text in [row["gold"] for row in learnt]


def test_a_model_goes_on_with_the_tokens_themselves(trained, tmp_path):
    folder, _ = trained
    model = tiny_evaluation.backend()
    with Store(tmp_path) as store:
        [found] = run([task_of(folder, samples=3)], {"subject": model}, store)
        [again] = run([task_of(folder, samples=3)], {"subject": model}, store)
    assert again.rows == found.rows
    shares = {row["score"] * ASKED for row in found.rows}
    assert all(share == pytest.approx(round(share)) for share in shares)
    assert [row["chunk"] for row in found.rows].count("held_out") == 3
    model.close()


def test_windows_that_are_too_short_are_named(trained):
    with pytest.raises(ValueError, match="no window begins with 52 tokens of one document"):
        task_of(trained[0], answer_tokens=44).examples()
