"""A run's folder: no step twice, nothing of another run, and a curve that can be looked at."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.provenance import code_revision, provenance
from training import json_lines
from training.errors import RunError
from training.plots import plot_loss, smooth
from training.record import Record, batch_hash, combine
from training.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
CONFIG = {"model": {"d_model": 16}, "train": {"steps": 10, "accumulation": 1}, "seed": 0}


def steps(path):
    return [row["step"] for row in json_lines.read(path)]


def test_a_resumed_run_has_every_step_once(tmp_path):
    with Record(tmp_path, CONFIG) as record:
        for step in range(1, 8):
            record.metrics(step, {"loss": jnp.float32(1 / step), "learning_rate": 1e-3}, "ab")
        record.evaluation(4, {"loss": 2.0})
        record.evaluation(7, {"loss": 1.0})
        with pytest.raises(ValueError, match=r"step 7 after step 7; rewind first"):
            record.metrics(7, {"loss": 0.0})
    with Record(tmp_path, CONFIG) as record:
        with pytest.raises(ValueError, match=r"step 5 after step 7"):
            record.metrics(5, {"loss": 0.0})
        assert record.rewind(4) == 4
        for step in range(5, 10):
            record.metrics(step, {"loss": 0.5})
        record.evaluation(7, {"loss": 1.5})
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 10))
    assert steps(tmp_path / "evaluations.jsonl") == [4, 7]
    first = json_lines.read(tmp_path / "metrics.jsonl")[0]
    assert (first["loss"], first["batch"]) == (1.0, "ab")
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_what_a_rollback_undoes_is_kept_in_its_branch_and_its_batches_stay_dropped(tmp_path):
    with Record(tmp_path, CONFIG) as record:
        record.write_data({"sources": ["a"]})
        for step in range(1, 7):
            record.metrics(step, {"loss": 1.0})
        record.rewind(3, branch="spike-6")
        record.drop((3, 6))
        record.drop((8, 9), defer=True)
        record.metrics(4, {"loss": 2.0})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps(tmp_path / "branches" / "spike-6" / "metrics.jsonl") == [4, 5, 6]
    with Record(tmp_path, CONFIG) as record:
        assert record.data == {"sources": ["a"]}
        assert (record.skips, record.deferred, record.rollbacks) == (((3, 6),), ((8, 9),), 2)


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    for step in (1, 2, 3):
        json_lines.append(path, {"step": step})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "lo')
    assert steps(path) == [1, 2, 3]
    assert json_lines.cut(path, lambda row: True) == []
    assert path.read_bytes() == whole
    path.write_bytes(b"oops\n" + whole)
    with pytest.raises(ValueError, match=r"rows.jsonl: line 1 is not JSON"):
        json_lines.read(path)


@settings(deadline=None)
@given(st.lists(st.floats(), max_size=5))
def test_every_number_survives_strict_json(values):
    line = json_lines.encode({"values": values, "array": np.float32(1.5), "device": jnp.arange(2)})

    def refuse(name):
        raise AssertionError(f"{name} is not strict JSON")

    row = json.loads(line, parse_constant=refuse)
    assert all(
        float(found) == value or (math.isnan(float(found)) and math.isnan(value))
        for found, value in zip(row["values"], values, strict=True)
    )
    assert (row["array"], row["device"]) == (1.5, [0, 1])


def test_lines_of_many_threads_never_mix(tmp_path):
    path = tmp_path / "rows.jsonl"
    threads = [
        threading.Thread(
            target=lambda name: [
                json_lines.append(path, {"t": name, "x": "y" * 5000}) for _ in range(50)
            ],
            args=(name,),
        )
        for name in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["t"] for row in json_lines.read(path)) == sorted(list(range(8)) * 50)


def test_a_folder_of_another_run_is_refused_by_field_and_left_as_it_is(tmp_path):
    Record(tmp_path, CONFIG).close()
    before = (tmp_path / "config.json").read_bytes()
    other = {"model": {"d_model": 32}, "train": {"steps": 20, "accumulation": 1}, "seed": 1}
    with pytest.raises(
        RunError, match=r"holds another run: model.d_model was 16, is 32; seed was 0, is 1"
    ):
        Record(tmp_path, other)
    assert (tmp_path / "config.json").read_bytes() == before
    with Record(tmp_path, CONFIG | {"train": {"steps": 20, "accumulation": 1}}) as record:
        assert record.changed == {"train.steps": [10, 20]}


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"holds thesis.tex but no config.json, so it is no run"):
        Record(tmp_path, CONFIG)


def test_two_jobs_never_write_one_run(tmp_path):
    with (
        Record(tmp_path, CONFIG),
        pytest.raises(RunError, match=r"in use by another process \(process \d+ on"),
    ):
        Record(tmp_path, CONFIG)
    Record(tmp_path, CONFIG).close()


@pytest.mark.slow
def test_a_killed_job_leaves_no_lock(tmp_path):
    code = (
        "import os, sys; from training.record import Record; "
        "Record(sys.argv[1], {'a': 1}); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -9
    Record(tmp_path, {"a": 1}).close()


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_the_hash_of_a_batch_is_that_of_its_parts_on_any_number_of_hosts(rows, cut, seed):
    random = np.random.default_rng(seed)
    batch = {
        "tokens": random.integers(0, 1000, (rows, 5), dtype=np.int32),
        "source_id": random.integers(0, 3, rows, dtype=np.int32),
    }
    cut = min(cut, rows)
    parts = [
        batch_hash({name: array[part] for name, array in batch.items()}, part.start)
        for part in (slice(0, cut), slice(cut, rows))
    ]
    whole = combine([batch_hash(batch)])
    assert combine(parts) == whole
    changed = batch | {"tokens": batch["tokens"].copy()}
    changed["tokens"][rows - 1, 4] += 1
    assert combine([batch_hash(changed)]) != whole
    if rows > 1 and not np.array_equal(batch["tokens"][0], batch["tokens"][-1]):
        assert combine([batch_hash({name: array[::-1] for name, array in batch.items()})]) != whole


def test_the_loss_curve_is_an_image_with_both_losses_and_the_rate(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(1, 200):
        loss = "nan" if step == 50 else 3 / step + 2
        json_lines.append(folder.metrics, {"step": step, "loss": loss, "learning_rate": 1e-3})
    json_lines.append(folder.evaluations, {"step": 199, "loss": 2.1})
    image = matplotlib.image.imread(
        plot_loss(folder.metrics, folder.evaluations, folder.plot, "run")
    )
    assert image.shape == (660, 960, 4)
    colours = {tuple(np.round(colour, 2)) for colour in image[..., :3].reshape(-1, 3)}
    for wanted in ((0.12, 0.47, 0.71), (1.0, 0.5, 0.05), (0.17, 0.63, 0.17)):
        assert any(np.allclose(colour, wanted, atol=0.02) for colour in colours)


def test_smoothing_has_no_bias_at_its_start():
    np.testing.assert_allclose(smooth(np.full(100, 3.0)), 3.0, rtol=1e-12)
    assert smooth(np.array([7.0])).tolist() == [7.0]


def test_there_is_no_curve_without_rows(tmp_path):
    with Record(tmp_path, CONFIG) as record:
        assert record.plot() is None
    assert not (tmp_path / "loss.png").exists()


def test_provenance_says_what_made_a_checkpoint_with_or_without_git(tmp_path):
    found = provenance("train", {"steps": 3}, ["runs/parent"])
    assert (found["method"], found["parents"], found["settings"]) == (
        "train",
        ["runs/parent"],
        {"steps": 3},
    )
    assert found["libraries"]["jax"]
    assert found["devices"]["count"] == 8
    json.dumps(found)
    assert code_revision(tmp_path) == {"revision": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    (tmp_path / "a").write_text("1")
    for arguments in (["init", "-q"], ["add", "a"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    clean = code_revision(tmp_path)
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert code_revision(tmp_path) == clean | {"dirty": True}
