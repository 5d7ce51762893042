"""Real processes: killed in the middle of a save, out of disk, and two that save together."""

from __future__ import annotations

import re
import socket
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from save_worker import CONFIG, KEEP_TWO, equal, finish, start, state

from training.checkpoints import Checkpoints

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("step", "event", "pattern", "expected"),
    [
        (2, "open", "_CHECKPOINT_METADATA", [1]),
        (2, "open", "tokenizer.json", [1]),
        (2, "open", "commit.json.writing", [1]),
        (2, "os.rename", r"00000002.partial -> .*00000002$", [1, 2]),
        (3, "os.rename", r"-> .*deleted$", [1, 2, 3]),
        (3, "shutil.rmtree", r"00000001.deleted", [2, 3]),
        (3, "os.rename", r"-> .*replaced$", [2, 3]),
    ],
)
def test_a_kill_in_the_middle_of_a_save_leaves_a_good_checkpoint(
    tmp_path, step, event, pattern, expected
):
    status, output, errors = finish(start("kill", tmp_path, step, event, pattern))
    assert status == -9, output + errors
    with Checkpoints(tmp_path, KEEP_TWO) as checkpoints:
        assert checkpoints.steps() == expected
        newest = checkpoints.latest_good()
        assert newest == expected[-1]
        found, cursor = checkpoints.restore(None, state(0))
        equal(found, state(newest))
        assert cursor == {"draw": newest}
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{s:08d}" for s in expected]
        checkpoints.save(9, state(9), CONFIG)


def test_a_replacement_cut_short_between_its_two_renames_is_finished(tmp_path):
    """The old checkpoint has lost its name and the new one has none yet."""
    status, output, errors = finish(
        start("kill", tmp_path, 3, "os.rename", r"00000003.partial -> .*00000003$")
    )
    assert status == -9, output + errors
    (tmp_path / "00000002").rename(tmp_path / "00000003.replaced")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 3]
        equal(checkpoints.restore(3, state(0))[0], state(3))


@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path, delay):
    process = start("kill", tmp_path, 9, "open", "never")
    while not (tmp_path / "00000001").is_dir():
        assert process.poll() is None
    threading.Event().wait(delay)
    process.kill()
    process.communicate()
    with Checkpoints(tmp_path) as checkpoints:
        newest = checkpoints.latest_good()
        assert newest is not None
        equal(checkpoints.restore(None, state(0))[0], state(newest))


def test_a_file_size_limit_fails_loudly_and_leaves_the_run_resumable(tmp_path):
    _, output, errors = finish(start("limit", tmp_path, 200_000))
    assert re.search(r"failed: checkpoint of step 2 .* resumable from step 1", output), (
        output + errors
    )
    with Checkpoints(tmp_path) as checkpoints:
        assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
        equal(checkpoints.restore(None, state(0, 16))[0], state(1, 16))


def test_two_processes_save_and_one_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [start("join", tmp_path, address, index, devices=4) for index in (0, 1)]
    for status, output, errors in [finish(process) for process in processes]:
        assert status == 0, output + errors
        assert "refused: checkpoint of step 7" in output
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2]
        before = state(1) | {"host": np.float32(3), "local": jnp.arange(3)}
        found, cursor = checkpoints.restore(None, before)
    equal(found, before)
    assert cursor == {"draw": 5}
