"""A run as a user has it: it trains, stops anywhere, resumes, replays, and refuses others."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny import tiny_config, write_text

from model.checkpoint import load
from training import RunError, train_language_model
from training.json_lines import read
from training.replay import compare_replay
from training.run_folder import RunFolder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of six steps that nothing disturbed."""
    config = tiny_config(text, evaluation__every=2, train__ema_decay=0.9)
    return config, train_language_model(
        config, tmp_path_factory.mktemp("run") / "whole", quiet=True
    )


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_a_run_leaves_metrics_evaluations_checkpoints_and_a_plot(whole):
    config, result = whole
    folder = RunFolder(result.workdir)
    rows = read(folder.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"grad_norm", "learning_rate", "tokens_per_second", "batch"} <= rows[0].keys()
    evaluations = read(folder.evaluations)
    assert [row["step"] for row in evaluations] == [2, 4, 6]
    assert {"loss", "bits_per_byte", "ema_loss"} <= evaluations[-1].keys()
    assert folder.plot.stat().st_size > 10_000
    assert list(folder.tensorboard.iterdir())
    checkpoint = load(result.workdir)
    assert checkpoint.config == config.model.resolve()
    assert checkpoint.provenance["method"] == "train"
    equal(checkpoint.params, result.state.params)


def test_the_loss_in_bits_per_byte_is_that_in_nats_over_the_bytes_of_a_token(whole):
    _, result = whole
    manifest = json.loads(RunFolder(result.workdir).order.read_text())["data"]
    nats = result.evaluation["loss"] / np.log(2) / manifest["bytes_per_token"]
    assert result.evaluation["bits_per_byte"] == pytest.approx(nats)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_stopped_anywhere_and_resumed_is_the_same_to_the_bit(whole, tmp_path, stop):
    config, undisturbed = whole
    first = train_language_model(config, tmp_path / "run", stop_at=stop, quiet=True)
    assert (first.step, first.finished, first.exit_status) == (stop, False, 3)
    resumed = train_language_model(config, tmp_path / "run", quiet=True)
    equal(resumed.state, undisturbed.state)
    rows, expected = (
        read(tmp_path / "run/metrics.jsonl"),
        read(undisturbed.workdir / "metrics.jsonl"),
    )
    assert [(r["step"], r["loss"], r["batch"]) for r in rows] == [
        (r["step"], r["loss"], r["batch"]) for r in expected
    ]


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    config, undisturbed = whole
    again = train_language_model(config, undisturbed.workdir, quiet=True)
    assert again.finished
    assert len(read(undisturbed.workdir / "metrics.jsonl")) == 6
    assert [row["step"] for row in read(undisturbed.workdir / "evaluations.jsonl")] == [2, 4, 6]
    assert read(undisturbed.workdir / "incidents.jsonl") == []
    assert again.evaluation == undisturbed.evaluation
    equal(again.state.params, undisturbed.state.params)


def test_more_steps_may_be_asked_for_and_the_change_is_recorded_and_replayed(text, tmp_path):
    config = tiny_config(text)
    train_language_model(config, tmp_path / "run", quiet=True)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=9))
    result = train_language_model(longer, tmp_path / "run", quiet=True)
    assert result.step == 9
    restart = read(tmp_path / "run/incidents.jsonl")[-1]
    assert restart["changed"] == {"train.steps": [6, 9]}
    comparison = compare_replay(tmp_path / "run", 9)
    assert comparison.equal, str(comparison)
    assert comparison.parameters is True
    assert comparison.steps == 9


def test_a_replay_of_tampered_data_says_where_it_differs(text, tmp_path):
    config = tiny_config(text)
    train_language_model(config, tmp_path / "run", quiet=True)
    folder = RunFolder(tmp_path / "run")
    rows = read(folder.metrics)
    rows[3]["loss"] += 1e-6
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = compare_replay(tmp_path / "run", 5)
    assert comparison.different == (4,)
    assert not comparison.equal
    assert "1 of 5 steps differ, first 4" in str(comparison)


def test_a_folder_that_holds_another_run_is_refused_and_left_alone(whole):
    config, result = whole
    other = dataclasses.replace(config, seed=1)
    before = RunFolder(result.workdir).config.read_text()
    with pytest.raises(RunError, match=r"holds another run: seed was 0, is 1.*--workdir"):
        train_language_model(other, result.workdir, quiet=True)
    assert RunFolder(result.workdir).config.read_text() == before


def test_data_that_has_changed_under_a_run_is_an_error(tmp_path):
    text = write_text(tmp_path / "text")
    config = tiny_config(text)
    train_language_model(config, tmp_path / "run", stop_at=3, quiet=True)
    write_text(tmp_path / "text", documents=50)
    with pytest.raises(RunError, match="the data has changed since this run began"):
        train_language_model(config, tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__vocab_size": 100}, r"vocab_size=100 is smaller than the tokenizer's 2\d\d"),
        (
            {"model__positions": "learned", "model__max_length": 16},
            r"data.length=32 is longer than the 16 learned positions",
        ),
        ({"data__batch_size": 12}, r"a batch of 12 rows does not divide into 8 devices"),
        ({"mesh__fsdp": 3}, r"fsdp=3"),
        ({"mesh__tensor": 8}, r"num_heads|heads"),
        ({"mesh__stage": 4}, r"2 layers do not divide over mesh.stage=4; use mesh.stage=1 or 2"),
        ({"train__trainable": "no/such/path.*"}, "train.trainable"),
        ({"data__path": "/no/such/file.txt"}, "/no/such/file.txt"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(text, tmp_path, fields, message):
    with pytest.raises((ValueError, RunError, OSError), match=message):
        train_language_model(tiny_config(text, **fields), tmp_path / "run", quiet=True)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_only_the_chosen_leaves_train_and_the_rest_have_no_optimizer_state(text, tmp_path):
    config = tiny_config(text, train__trainable=r"layers/.*/feed_forward/.*", train__steps=2)
    result = train_language_model(config, tmp_path / "run", quiet=True)
    start = train_language_model(config, tmp_path / "start", stop_at=1, quiet=True)
    equal(start.state.params["embed"], result.state.params["embed"])
    moved = result.state.params["layers"]["000-002"]["feed_forward"]["up"]["kernel"]
    assert not np.array_equal(
        moved, start.state.params["layers"]["000-002"]["feed_forward"]["up"]["kernel"]
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(result.state.opt_state)]
    assert max(sizes) == 2 * 32 * 64


def test_a_new_run_can_begin_with_the_parameters_of_another(whole, text, tmp_path):
    config, trained = whole
    tuned = dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=2, start_from=str(trained.workdir))
    )
    result = train_language_model(tuned, tmp_path / "tuned", quiet=True)
    first, last = (read(run.workdir / "metrics.jsonl") for run in (result, trained))
    assert first[0]["loss"] < last[0]["loss"] - 0.5
    assert load(result.workdir).provenance["parents"] == [str(trained.workdir)]
    other = tiny_config(text, model__d_ff=96, train__start_from=str(trained.workdir))
    with pytest.raises(RunError, match=r"start_from=.*feed_forward/.* is \(2, .*64.*96"):
        train_language_model(other, tmp_path / "other", quiet=True)
