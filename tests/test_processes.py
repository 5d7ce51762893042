"""`train.py` as real processes: interrupted, killed, on two hosts at once, and resumed on one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from child_flags import cpu_devices
from tiny import tiny_config, write_text

from model.checkpoint import load
from training import train_language_model
from training.json_lines import read

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
CONFIG = """
from tiny import tiny_values
from pathlib import Path

def get_config():
    return tiny_values(Path({text!r}), train__steps={steps}, checkpoint__every={every})
"""


def write_config(folder: Path, text: Path, steps: int = 6, every: int = 3) -> Path:
    path = folder / "config.py"
    path.write_text(CONFIG.format(text=str(text), steps=steps, every=every))
    return path


def start(config: Path, workdir: Path, *flags: str, devices: int = 8) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_devices(devices),
    }
    return subprocess.Popen(
        [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in read(workdir / "metrics.jsonl")):
            return
        if process.poll() is not None:
            raise AssertionError(f"ended early:\n{process.communicate()[0]}")
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no step {step} in time:\n{process.communicate()[0]}")


def assert_equal_params(run: Path, params) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        load(run).params,
        params,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_how_to_resume_and_nothing_is_lost(text, tmp_path, number):
    config = write_config(tmp_path, text, steps=400, every=1000)
    process = start(config, tmp_path / "run")
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 3, output
    assert number.name in output
    assert "the same command resumes it" in output
    saved = read(tmp_path / "run/metrics.jsonl")[-1]["step"]
    assert f"saved step {saved} of 400" in output
    if number != signal.SIGTERM:
        return  # what follows is the same whichever signal it was
    result = train_language_model(
        tiny_config(text, train__steps=400, checkpoint__every=1000),
        tmp_path / "run",
        stop_at=saved + 2,
        quiet=True,
    )
    undisturbed = train_language_model(
        tiny_config(text, train__steps=400, checkpoint__every=1000),
        tmp_path / "whole",
        stop_at=saved + 2,
        quiet=True,
    )
    assert_equal_params(result.workdir, undisturbed.state.params)


def test_a_killed_run_resumes_from_its_last_checkpoint_to_the_same_bits(text, tmp_path):
    config = write_config(tmp_path, text, steps=40, every=5)
    process = start(config, tmp_path / "run")
    wait_for_step(tmp_path / "run", 8, process)
    process.kill()
    process.communicate()
    values = tiny_config(text, train__steps=40, checkpoint__every=5)
    resumed = train_language_model(values, tmp_path / "run", quiet=True)
    whole = train_language_model(values, tmp_path / "whole", quiet=True)
    assert_equal_params(resumed.workdir, whole.state.params)
    steps = [row["step"] for row in read(tmp_path / "run/metrics.jsonl")]
    assert steps == list(range(1, 41))


def test_two_processes_train_are_killed_and_resume_on_one(text, tmp_path):
    config = write_config(tmp_path, text, steps=40, every=4)
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2"]
    run = tmp_path / "run"
    processes = [
        start(config, run, *flags, f"--process-id={i}", "--config.mesh.fsdp=4", devices=4)
        for i in range(2)
    ]
    wait_for_step(run, 10, processes[0])
    for process in processes:
        process.kill()
    outputs = [process.communicate()[0] for process in processes]
    assert "step 1/40  loss" in outputs[0]
    assert "step 1/40" not in outputs[1]
    values = tiny_config(text, train__steps=40, checkpoint__every=4)
    resumed = train_language_model(values, run, quiet=True)
    whole = train_language_model(values, tmp_path / "whole", quiet=True)
    assert resumed.step == 40
    for mine, theirs in zip(
        read(run / "metrics.jsonl"), read(tmp_path / "whole/metrics.jsonl"), strict=True
    ):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        if "batch" in mine:
            assert mine["batch"] == theirs["batch"]
    (restart,) = [r for r in read(run / "incidents.jsonl") if r["kind"] != "straggler"]
    assert restart["kind"] == "restart"
    assert restart["changed"] == {"mesh.fsdp": [4, 1]}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4),
        resumed.state.params,
        whole.state.params,
    )


def test_the_process_that_holds_the_others_up_is_named(tmp_path):
    port = str(free_port())
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_devices(1),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "tests/straggler_worker.py", port, str(i), str(tmp_path / "run")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    slow = [row for row in read(tmp_path / "run/incidents.jsonl") if row["kind"] == "straggler"]
    assert {(row["slow_process"], row["part"]) for row in slow} == {(1, "host")}
    assert "process 1 is slow" in outputs[0]
