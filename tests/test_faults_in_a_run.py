"""A poisoned stretch of data in a run: found, rolled back, skipped or deferred, and recorded."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding import Layout, make_mesh
from training import (
    CheckpointConfig,
    FaultConfig,
    OptimizerConfig,
    RunConfig,
    RunError,
    ScheduleConfig,
    SpikeDetector,
    TrainConfig,
    from_functions,
    train,
)
from training.json_lines import read
from training.spike_guard import no_losses, remember, robust_score

POISON = range(60, 72)
TRUTH = jnp.array([1.0, -2.0, 3.0, 0.5])


def batch(step: int, poison=POISON, value: float = 100.0):
    """Rows of a noisy linear map; those of poisoned batches have another target."""
    rng = np.random.default_rng(step)
    x = rng.normal(size=(16, 4)).astype(np.float32)
    y = x @ np.asarray(TRUTH) + 0.1 * rng.normal(size=16).astype(np.float32)
    return {"x": x, "y": np.full_like(y, value) if step in poison else y}


def loss(apply, params, batch, rng):
    error = apply(params, batch, rng)[0] - batch["y"]
    return jnp.mean(error**2), {}


def task(start=0.0, **options):
    return from_functions(
        init=lambda key: {"linear": {"kernel": start * TRUTH[:, None]}},
        apply=lambda params, batch, rng: ((batch["x"] @ params["linear"]["kernel"])[:, 0], {}),
        batch=lambda step: batch(step, **options),
        loss=loss,
        predict=lambda apply, params, batch, rng: apply(params, batch, rng)[0],
    )


def config(steps: int = 160, clip_norm: float = 0.0, **faults) -> RunConfig:
    return RunConfig(
        name="poison",
        train=TrainConfig(steps=steps, clip_norm=clip_norm),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.05, weight_decay=0.0),
        schedule=ScheduleConfig(name="constant", warmup=0),
        checkpoint=CheckpointConfig(every=10, keep_last=20),
        faults=FaultConfig(**{"window": 40, "patience": 12, "margin": 2, **faults}),
    )


def error_of(result) -> float:
    return float(jnp.abs(result.state.params["linear"]["kernel"][:, 0] - TRUTH).max())


@pytest.mark.parametrize("action", ["rollback", "defer"])
def test_a_malignant_spike_rolls_back_past_its_onset_and_drops_its_batches(tmp_path, action):
    result = train(task(), config(spike_action=action), tmp_path / "run", quiet=True)
    assert result.finished
    incidents = read(tmp_path / "run/incidents.jsonl")
    rollback = next(row for row in incidents if row["kind"] == "rollback")
    assert rollback["to_step"] < POISON.start <= rollback["step"]
    first, stop = rollback["batches"]
    assert first <= POISON.start < stop
    rows = read(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 161))
    assert rollback["deferred"] == (action == "defer")
    assert read(next((tmp_path / "run/branches").iterdir()) / "metrics.jsonl")
    assert error_of(result) < 0.1


def test_deferred_batches_that_spike_again_are_not_deferred_for_ever(tmp_path):
    train(task(), config(spike_action="defer"), tmp_path / "run", quiet=True)
    rollbacks = [r for r in read(tmp_path / "run/incidents.jsonl") if r["kind"] == "rollback"]
    assert [row["deferred"] for row in rollbacks] == [True, False]


def test_an_alert_changes_nothing_but_the_record(tmp_path):
    result = train(task(), config(spike_action="alert"), tmp_path / "run", quiet=True)
    incidents = read(tmp_path / "run/incidents.jsonl")
    assert {row["outcome"] for row in incidents if row["kind"] == "spike"} >= {"open", "malignant"}
    assert not [row for row in incidents if row["kind"] == "rollback"]
    assert result.finished


def test_a_few_bad_batches_with_clipped_updates_are_benign(tmp_path):
    one = task(start=1.0, poison=range(60, 63))
    train(one, config(clip_norm=0.01, spike_action="rollback"), tmp_path / "run", quiet=True)
    incidents = read(tmp_path / "run/incidents.jsonl")
    assert not [row for row in incidents if row["kind"] == "rollback"]
    assert [row["outcome"] for row in incidents] == ["open", "benign"]


def test_an_update_that_is_not_finite_is_skipped_and_the_parameters_stay_clean(tmp_path):
    broken = task(poison=range(60, 62), value=float("nan"))
    result = train(broken, config(), tmp_path / "run", quiet=True)
    assert int(result.state.skipped) == 2
    assert error_of(result) < 0.1
    kinds = [row["kind"] for row in read(tmp_path / "run/incidents.jsonl")]
    assert kinds.count("nonfinite") == 2


def test_the_policy_stop_ends_the_run_with_the_reason_and_leaves_it_resumable(tmp_path):
    broken = task(poison=range(60, 62), value=float("inf"))
    with pytest.raises(RunError, match=r"not finite at step 61"):
        train(broken, config(nonfinite="stop"), tmp_path / "run", quiet=True)
    clean = train(task(poison=()), config(nonfinite="stop"), tmp_path / "run", quiet=True)
    assert clean.finished
    assert error_of(clean) < 0.1


def test_a_run_that_rolled_back_resumes_with_the_same_batches_left_out(tmp_path):
    policy = config(spike_action="rollback")
    whole = train(task(), policy, tmp_path / "whole", quiet=True)
    rolled = read(tmp_path / "whole/incidents.jsonl")
    step = next(row for row in rolled if row["kind"] == "rollback")["step"]
    train(task(), policy, tmp_path / "run", stop_at=step - 3, quiet=True)
    train(task(), policy, tmp_path / "run", stop_at=step - 1, quiet=True)
    resumed = train(task(), policy, tmp_path / "run", quiet=True)
    np.testing.assert_array_equal(
        resumed.state.params["linear"]["kernel"], whole.state.params["linear"]["kernel"]
    )


def test_the_same_three_functions_give_the_same_run_on_one_and_eight_devices(tmp_path):
    eight = train(task(), config(20), tmp_path / "eight", quiet=True)
    one = train(
        task(),
        config(20),
        tmp_path / "one",
        layout=Layout(make_mesh(None, jax.devices()[:1])),
        quiet=True,
    )
    np.testing.assert_allclose(
        eight.state.params["linear"]["kernel"], one.state.params["linear"]["kernel"], rtol=1e-5
    )


def test_a_loss_that_is_no_scalar_is_named_with_its_shape(tmp_path):
    bad = dataclasses.replace(
        task(),
        objective=from_functions(
            init=task().init,
            apply=task().apply,
            batch=batch,
            loss=lambda apply, params, batch, rng: (
                (apply(params, batch, rng)[0] - batch["y"]) ** 2,
                {},
            ),
        ).objective,
    )
    with pytest.raises((TypeError, ValueError), match=r"\(16,\)"):
        train(bad, config(2), tmp_path / "run", quiet=True)


def test_a_phase_edits_the_state_between_steps_and_a_resumed_run_repeats_it(tmp_path):
    def prune(step, state):
        if step != 5:
            return state
        kernel = state.params["linear"]["kernel"].at[1].set(0.0)
        return dataclasses.replace(state, params={"linear": {"kernel": kernel}})

    phased = dataclasses.replace(task(), phases=(prune,))
    whole = train(phased, config(8), tmp_path / "whole", quiet=True)
    train(phased, config(8), tmp_path / "run", stop_at=5, quiet=True)
    resumed = train(phased, config(8), tmp_path / "run", quiet=True)
    np.testing.assert_array_equal(
        whole.state.params["linear"]["kernel"], resumed.state.params["linear"]["kernel"]
    )
    plain = train(task(), config(8), tmp_path / "plain", quiet=True)
    assert abs(plain.state.params["linear"]["kernel"][1, 0]) > abs(
        whole.state.params["linear"]["kernel"][1, 0]
    )


def test_a_fault_in_the_very_last_step_still_ends_with_a_whole_run(tmp_path):
    broken = task(poison=range(19, 20), value=float("nan"))
    result = train(broken, config(20, nonfinite="rollback"), tmp_path / "run", quiet=True)
    assert result.finished
    assert int(result.state.skipped) == 0
    assert [row["step"] for row in read(tmp_path / "run/metrics.jsonl")] == list(range(1, 21))


def test_updates_of_a_spike_are_refused_and_the_same_ones_after_a_resume(tmp_path):
    guarded = config(90, spike_action="skip", window=40)
    short = task(poison=range(60, 64))
    result = train(short, guarded, tmp_path / "run", quiet=True)
    assert int(result.state.skipped) == 4
    assert error_of(result) < 0.1
    rows = read(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if row["spike"]] == [61, 62, 63, 64]
    skipped = [r for r in read(tmp_path / "run/incidents.jsonl") if r.get("outcome") == "skipped"]
    assert [row["onset"] for row in skipped] == [61, 62, 63, 64]
    train(short, guarded, tmp_path / "again", stop_at=62, quiet=True)
    resumed = train(short, guarded, tmp_path / "again", quiet=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, result.state)


@settings(deadline=None, max_examples=25)
@given(
    losses=st.lists(st.floats(0.125, 8.0, width=32), min_size=1, max_size=80),
    loss=st.floats(0.125, 64.0, width=32),
)
def test_the_score_inside_the_step_is_that_of_the_detector(losses, loss):
    detector, window = SpikeDetector(window=40), no_losses(40)
    for count, value in enumerate(losses):
        detector._losses.append(value)
        window = remember(window, jnp.float32(value), jnp.bool_(True), count)
    expected = detector.score(loss)
    np.testing.assert_allclose(robust_score(window, loss), expected, rtol=1e-3, atol=1e-2)
