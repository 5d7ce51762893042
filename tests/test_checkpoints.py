"""A run's checkpoints: exact resume, and no kill, full disk or rollback that costs the last good
one.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from save_worker import CONFIG, equal, state

from model.checkpoint_folder import CheckpointError
from training.checkpoints import CheckpointConfig, Checkpoints
from training.retention import kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A training state with all that optax and a loop put into one."""

    params: dict
    opt_state: tuple
    rng: jax.Array
    step: jax.Array
    ema: dict | None = None


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def first_state():
    params = {"w": jax.random.normal(jax.random.key(0), (64, 64)), "b": jnp.zeros(64, jnp.bfloat16)}
    return State(params, OPTIMIZER.init(params), jax.random.key(3), jnp.int32(0))


@jax.jit(donate_argnums=0)
def update(state):
    x = jax.random.normal(jax.random.fold_in(state.rng, state.step), (4, 64))

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - x) ** 2)

    updates, opt_state = OPTIMIZER.update(
        jax.grad(loss)(state.params), state.opt_state, state.params
    )
    return State(optax.apply_updates(state.params, updates), opt_state, state.rng, state.step + 1)


def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path):
    """The state is donated while the save is still being written."""
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=9)) as checkpoints:
        current = first_state()
        for step in range(1, 13):
            current = update(current)
            if step % 2 == 0:
                checkpoints.save(
                    step, current, CONFIG, cursor={"draw": step, "window": [0.1 + 0.2]}
                )
        for step in (2, 6, 10):
            resumed, cursor = checkpoints.restore(step, jax.eval_shape(first_state))
            assert cursor == {"draw": step, "window": [0.1 + 0.2]}
            for _ in range(step, 12):
                resumed = update(resumed)
            equal(resumed, current)


@pytest.mark.parametrize(
    ("shape", "spec"), [((8,), ("x",)), ((2, 4), ("y", "x")), ((4,), (None, "x"))]
)
def test_a_state_is_restored_onto_another_mesh(tmp_path, shape, spec):
    axes = ("x", "y")[: len(shape)]
    mesh = jax.make_mesh(shape, axes, devices=jax.devices()[: int(np.prod(shape))])
    target = NamedSharding(mesh, PartitionSpec(*spec))
    before = state(
        1, sharding=NamedSharding(jax.make_mesh((4, 2), ("a", "b")), PartitionSpec("a", "b"))
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=target if leaf.ndim == 2 else everywhere
        ),
        before,
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, before, CONFIG)
        after, _ = checkpoints.restore(None, abstract)
    equal(after, before)
    assert jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, after, abstract))


def test_another_model_is_refused_by_field_and_another_state_by_path(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), CONFIG)
        other = dataclasses.replace(CONFIG, d_model=32, kv_heads=2)
        with pytest.raises(
            CheckpointError,
            match=r"model.d_model is 16 there, 32 here; model.kv_heads is 4 there, 2",
        ):
            checkpoints.restore(1, state(1), other)
        with pytest.raises(
            CheckpointError, match=r"missing in it: optimizer/second; only in it: optimizer/count"
        ):
            checkpoints.restore(1, state(1) | {"optimizer": {"second": jnp.zeros(3)}})
        with pytest.raises(
            CheckpointError, match=r"kernel is float32\[8, 4096\], wanted float32\[8, 16\]"
        ):
            checkpoints.restore(1, state(1, size=4))
        narrow = {"params": {"kernel": jnp.zeros((8, 4096), jnp.bfloat16)}}
        with pytest.raises(
            CheckpointError, match=r"float32\[8, 4096\], wanted bfloat16\[8, 4096\]"
        ):
            checkpoints.restore(1, state(1) | narrow)


def test_a_named_step_that_is_damaged_is_an_error_and_the_newest_is_passed_over(tmp_path, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), CONFIG, cursor={"draw": step})
        checkpoints.wait()
        (tmp_path / "00000002" / "cursor.json").write_text("{")
        assert checkpoints.latest_good() == 1
        assert checkpoints.good_steps() == [1]
        assert "skipped checkpoint" in caplog.text
        assert checkpoints.restore(None, state(1))[1] == {"draw": 1}
        with pytest.raises(
            CheckpointError, match=r"step 2 .* cannot be used: corrupt: cursor.json has 1 bytes"
        ):
            checkpoints.restore(2, state(2))
        with pytest.raises(
            CheckpointError, match=r"step 7 .* no such folder; steps there: \[1, 2\]"
        ):
            checkpoints.restore(7, state(7))


def save_until_full(checkpoints):
    for step in range(1, 40):
        checkpoints.save(step, state(step, size=128), CONFIG)


# Writes that end after the first has failed find Orbax's event loop closed and say so on stderr.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_fails_loudly_and_leaves_the_run_resumable(tmp_path):
    size = 3_000_000
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        with Checkpoints(tmp_path / "c", CheckpointConfig(keep_last=99)) as checkpoints:
            with pytest.raises(CheckpointError, match=r"(No space|ENOSPC).*resumable") as failure:
                save_until_full(checkpoints)
            good = int(re.findall(r"from step (\d+)", str(failure.value))[0])
            assert checkpoints.steps() == list(range(1, good + 1))
            assert not list((tmp_path / "c").glob("*partial*"))
            equal(checkpoints.restore(None, state(0, size=128))[0], state(good, size=128))
            checkpoints.abandon(after=0)
            checkpoints.save(50, state(50, size=128), CONFIG)
            checkpoints.wait()
            assert checkpoints.latest_good() == 50
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_policies_keep_the_last_every_nth_and_the_best(tmp_path):
    rules = CheckpointConfig(keep_last=2, keep_every=4, keep_best=1, best_metric="loss")
    losses = [5.0, 4.0, 1.0, 3.0, float("nan"), 2.5, 2.0, 2.0, 2.0]
    with Checkpoints(tmp_path, rules) as checkpoints:
        for step, loss in enumerate(losses, start=1):
            checkpoints.save(step, state(1, size=4), CONFIG, metrics={"loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4, 8, 9]
        assert checkpoints.metrics(3) == {"loss": 1.0}


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(0, 99), st.dictionaries(st.just("m"), st.floats()), min_size=1),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(0, 3),
    st.booleans(),
)
def test_no_policy_ever_drops_the_newest_or_keeps_fewer_than_it_says(
    steps, last, every, best, largest
):
    keep = kept(steps, last, every, best, "m", largest)
    assert max(steps) in keep
    assert sorted(keep)[-last:] == sorted(steps)[-last:]
    numbers = [
        entry["m"] for entry in steps.values() if entry.get("m", np.nan) == entry.get("m", np.nan)
    ]
    if best and numbers:
        chosen = (max if largest else min)(numbers)
        assert any(steps[step].get("m") == chosen for step in keep)


def test_rolling_back_sets_later_checkpoints_aside(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep_last=9)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step, size=4), CONFIG)
        assert checkpoints.abandon(1, tmp_path / "branches" / "spike-3") == [2, 3]
        assert checkpoints.latest_good() == 1
        checkpoints.save(2, state(20, size=4), CONFIG)
        equal(checkpoints.restore(2, state(0, size=4))[0], state(20, size=4))
    with Checkpoints(tmp_path / "branches" / "spike-3") as branch:
        equal(branch.restore(3, state(0, size=4))[0], state(3, size=4))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"checkpoint.keep_last=0 must be at least 1"):
        CheckpointConfig(keep_last=0)
