"""An evaluation from examples to files: resumed after a kill, compared, and run by its command."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_evaluation
from tiny_engine import TOKENIZER

from evals import (
    Generate,
    Hidden,
    Loglikelihood,
    Options,
    Place,
    Rolling,
    Store,
    Task,
    compare_folders,
    evaluate,
    mean,
)
from evals.__main__ import main
from evals.results import read, read_rows
from evals.runner import Counts, run
from evals.store import key_of, model_fingerprint
from model import forward, hidden_states
from model.checkpoint import save

OPTIONS = tiny_evaluation.OPTIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evals")
    tiny_evaluation.write_files(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """An evaluation that nothing stops."""
    model = tiny_evaluation.backend()
    found = evaluate(model, tiny_evaluation.tasks(folder), out=folder / "whole", options=OPTIONS,
                     say=None)  # fmt: skip
    yield found["tiny"]
    model.close()


def work(folder):
    return json.loads((folder / "tiny" / "work.json").read_text())


def test_values_are_those_of_the_model(folder, whole):
    estimates = whole["tasks"]["perplexity"]["estimates"]
    documents = [json.loads(line) for line in (folder / "documents.jsonl").read_text().split("\n")]
    nats = bits = 0.0
    model = tiny_evaluation.checkpoint()
    logits = jax.jit(lambda tokens: forward(model.params, tokens, model.config)[0])
    short = [d["text"] for d in documents if len(d["text"].encode()) < 90]
    rows = {row["prompt"]: row for row in read_rows(folder / "whole" / "tiny", "perplexity")}
    for text in short[:4]:
        tokens = np.full((1, 96), 0, np.int32)
        ids = [TOKENIZER.bos, *text.encode()]
        tokens[0, : len(ids)] = ids
        scores = np.asarray(logits(tokens)[0], np.float64)[: len(ids) - 1]
        log_z = np.log(np.exp(scores).sum(1))
        nats = float((log_z - scores[np.arange(len(ids) - 1), ids[1:]]).sum())
        assert rows[text]["nats"] == pytest.approx(nats, abs=1e-3)
    total, size = (sum(r[k] for r in rows.values()) for k in ("nats", "bytes"))
    bits = total / size / math.log(2)
    assert estimates["bits_per_byte"].value == pytest.approx(bits, rel=1e-12)
    assert {"bits_per_byte/x", "bits_per_byte/y"} < set(estimates)
    assert whole["tasks"]["multiple_choice"]["estimates"]["acc"].n == 40
    assert whole["tasks"]["iq_head_tail"]["unparsed"] is not None


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_bytes(folder, whole):
    program = Path(tiny_evaluation.__file__)
    env = {**os.environ, "PYTHONPATH": f"{program.parent.parent}:{program.parent}"}
    done = subprocess.run([sys.executable, program, folder, "100"], env=env, timeout=600)
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "killed" / "tiny").exists()
    model = tiny_evaluation.backend()
    evaluate(model, tiny_evaluation.tasks(folder), out=folder / "killed", options=OPTIONS, say=None)
    model.close()
    names = [p.relative_to(folder / "whole") for p in (folder / "whole").rglob("*.json*")]
    assert len(names) == 5
    for name in names:
        if name.name != "work.json":
            assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    again, first = work(folder / "killed"), work(folder / "whole")
    assert 0 < again["computed"] <= 0.55 * first["computed"]
    assert 0 < again["rows"] <= 0.55 * first["rows"]


def test_what_is_there_is_not_computed_again_nor_lent_to_another_model(folder, whole):
    before = (folder / "whole" / "tiny" / "results.json").read_bytes()
    model = tiny_evaluation.backend()
    evaluate(model, tiny_evaluation.tasks(folder), out=folder / "whole", options=OPTIONS, say=None)
    assert work(folder / "whole")["computed"] == 0
    assert model.work()["rows"] == 0
    assert (folder / "whole" / "tiny" / "results.json").read_bytes() == before
    one, other = tiny_evaluation.checkpoint(), tiny_evaluation.checkpoint(scale=1.001)
    assert model_fingerprint(one) != model_fingerprint(other)
    assert model_fingerprint(one) == model_fingerprint(tiny_evaluation.checkpoint("elsewhere"))
    request = Loglikelihood("a", "b")
    assert key_of(request, {"model": 1}) != key_of(request, {"model": 2})
    assert key_of(request, {}) != key_of(Loglikelihood("a", "c"), {})
    model.close()


def test_two_models_are_compared_on_the_same_examples(folder, whole, tmp_path):
    other = tiny_evaluation.backend(name="other", scale=1.5)
    tasks = tiny_evaluation.tasks(folder)[:2]
    found = evaluate(other, tasks, out=folder / "whole", options=OPTIONS, say=None)
    compared = {
        each.task: each
        for each in compare_folders(*(folder / "whole" / n for n in ("tiny", "other")))
    }
    assert set(compared) == {"perplexity", "multiple_choice"}
    bits = compared["perplexity"]
    rows = [read_rows(folder / "whole" / name, "perplexity") for name in ("tiny", "other")]
    assert bits.comparison.n == 40
    assert bits.flipped[0] in {row["id"] for row in rows[0]}
    assert found["other"]["tasks"]["perplexity"]["estimates"]["bits_per_byte"].value > 0
    evaluate(other, tasks, out=tmp_path, options=Options(limit=7), say=None)
    with pytest.raises(ValueError, match=r"ran on other examples \(40 and 7"):
        compare_folders(folder / "whole" / "tiny", tmp_path / "other")
    other.close()


def task(run, name="own", ids=("a", "b")):
    place = Place("knowledge and capability", "reasoning")
    examples = [{"id": each, "text": each * 9} for each in ids]
    return Task(
        name,
        "1",
        "",
        place,
        lambda: examples,
        run,
        lambda rows: {"score": mean([r["score"] for r in rows])},
    )


def test_a_coroutine_may_ask_again_and_for_hidden_states(tmp_path):
    def asks(example, context):
        prompt = example["text"]
        [first] = yield [
            Generate(prompt, max_tokens=4),
        ]
        prompt += first.texts[0]
        [states, second] = yield [
            Hidden(prompt, (0, 2), (0, -1), attention=(1,)),
            Generate(prompt + "x", max_tokens=2),
        ]
        [nothing] = yield [Rolling("")]
        assert (nothing.tokens, nothing.logprob) == (0, 0.0)
        value, looked = states.values, states.attention
        assert looked.shape[:2] == (2, 1)
        np.testing.assert_allclose(looked.sum(-1), 1.0, atol=1e-5)
        assert np.all(looked[0, ..., 1:] == 0)  # The first token sees only itself.
        return {
            "score": float(value.sum()),
            "shape": value.shape,
            "turns": [*first.texts, *second.texts],
        }

    model, counts = tiny_evaluation.backend(), Counts()
    with Store(tmp_path) as store:
        [found] = run([task(asks)], {"subject": model}, store, counts=counts)
        assert (counts.answered, counts.computed) == (7, 7)
        [again] = run([task(asks)], {"subject": model}, store, counts=counts)
    assert (counts.answered, counts.computed) == (14, 7)
    assert again.rows == found.rows
    assert [row["shape"] for row in found.rows] == [(2, 2, 16)] * 2
    checkpoint = tiny_evaluation.checkpoint()
    ids = TOKENIZER.encode_prompt("a" * 9 + found.rows[0]["turns"][0])[None]
    taps = hidden_states(
        checkpoint.params, ids, checkpoint.config, taps=("embeddings", "layers/1/hidden")
    )[1]["taps"]
    total = sum(float(np.asarray(x[0, [0, -1]], np.float64).sum()) for x in taps.values())
    assert found.rows[0]["score"] == pytest.approx(total, abs=1e-3)
    model.close()


def test_wrong_examples_and_requests_are_named(tmp_path):
    def endless(example, context):
        yield [Generate(example["text"], max_tokens=500)]
        return {"score": 0.0}

    def empty(example, context):
        yield [Loglikelihood("x", example["text"] if example["id"] == "a" else "")]
        return {"score": 0.0}

    def misses(example, context):
        yield []
        return {"score": example["answer"]}

    model = tiny_evaluation.backend()
    with Store(tmp_path) as store:
        for each, said in [
            (task(endless), "task own, example a: asks for 500 tokens; the model holds 96"),
            (task(empty), "task own, example b: .*no token"),
            (task(misses), "task own, example a: no field 'answer'"),
            (task(misses, ids=("a", "a")), "two examples have the id 'a'"),
            (task(misses, ids=()), "has no examples"),
        ]:
            with pytest.raises(ValueError, match=said):
                run([each], {"subject": model}, store)
        with pytest.raises(ValueError, match="two tasks are called 'own'"):
            run([task(misses), task(misses)], {"subject": model}, store)
    model.close()


def test_the_command_evaluates_compares_and_says_what_is_wrong(folder, tmp_path, capsys):
    paths = []
    for name, scale in (("one", 1.0), ("two", 1.3)):
        made = tiny_evaluation.checkpoint(scale=scale)
        paths.append(str(save(tmp_path / name, made.config, made.params, made.files)))
    given = [
        f"--checkpoint={','.join(paths)}", "--tasks=multiple_choice,perplexity",
        f"--out={tmp_path / 'out'}", f"--multiple_choice.path={folder / 'questions.jsonl'}",
        f"--perplexity.path={folder / 'documents.jsonl'}", "--limit=12", "--token-budget=512",
    ]  # fmt: skip
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "| multiple_choice | acc_norm |" in shown
    assert "two against one:" in shown
    outputs = [str(tmp_path / "out" / name) for name in ("one", "two")]
    assert read(outputs[0])["tasks"]["multiple_choice"]["examples"] == 12
    assert main(["compare", *outputs]) == 0
    assert main(["report", *outputs]) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    assert main(["tasks"]) == 0
    assert "settings: words, depths" in capsys.readouterr().out
    for wrong, said in [
        ([*given[:2], given[2]], "needs --multiple_choice.path"),
        ([given[0], "--tasks=neddle", given[2]], "nearest: needle"),
        (["run", "--model=nowhere", "--tasks=needle", given[2]], "nowhere"),
        (["compare", outputs[0], str(tmp_path)], "no such file"),
        (["report", "--a.b=c", outputs[0]], "only `run` and `sweep` take those"),
    ]:
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
