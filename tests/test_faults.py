"""Spikes, non-finite steps, hangs and signals: what is noticed, decided and written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.deferral import DeferredStream
from training.faults import CONTINUE, Action, FaultConfig, Incident, SpikeDetector, decide
from training.incidents import Incidents
from training.signals import GracefulStop
from training.stragglers import StepTimes, gather, probe_seconds, report, stragglers
from training.task import FunctionStream
from training.watchdog import Watchdog

ROOT = Path(__file__).parent.parent


def losses(count, seed=0):
    """A falling, noisy curve such as training gives: float[count]."""
    noise = np.random.default_rng(seed).normal(0, 0.03, count)
    return 2 + 3 * np.exp(-np.arange(count) / 150) + noise


def watch(values):
    detector = SpikeDetector()
    return [found for step, loss in enumerate(values, 1) if (found := detector.update(step, loss))]


def test_an_ordinary_run_reports_nothing():
    for seed in range(5):
        assert watch(losses(2000, seed)) == []


def test_scores_equal_numpy_and_leave_the_spike_out_of_the_window():
    values = losses(400)
    detector = SpikeDetector()
    for step, loss in enumerate(values[:300], 1):
        detector.update(step, loss)
    for step in range(301, 340):
        detector.update(step, 9.0)
    window = values[300 - 256 : 300]
    middle = np.median(window)
    expected = (9.0 - middle) / (1.4826 * np.median(np.abs(window - middle)) + 1e-6)
    assert detector.score(9.0) == pytest.approx(expected, rel=1e-12)


def test_one_poisoned_batch_is_no_spike_and_a_short_one_is_benign():
    values = losses(1000)
    values[600] += 4
    assert watch(values) == []
    values[700:704] += 4
    opened, closed = watch(values)
    assert (opened.outcome, opened.onset, opened.detected) == ("open", 701, 703)
    assert (closed.outcome, closed.onset, closed.detected) == ("benign", 701, 707)
    assert opened.loss_before == pytest.approx(2.03, abs=0.05)


def test_a_lasting_spike_is_malignant_after_patience_and_then_becomes_the_new_level():
    values = losses(1000)
    values[600:] += 4
    opened, closed = watch(values)
    assert (opened.outcome, opened.detected) == ("open", 603)
    assert (closed.outcome, closed.onset, closed.detected) == ("malignant", 601, 701)
    values[900:903] += 4
    assert [incident.outcome for incident in watch(values)][2:] == ["open", "benign"]


def test_a_spike_that_dips_for_a_step_is_still_one_spike():
    values = losses(1000)
    values[600:] += 4
    values[[610, 640, 641]] -= 4
    assert [incident.outcome for incident in watch(values)] == ["open", "malignant"]


def test_non_finite_loss_and_gradient_are_reported_at_once_and_counted():
    detector = SpikeDetector()
    detector.update(1, 2.0, 1.0)
    first, second = detector.update(2, math.nan, 1.0), detector.update(3, 2.0, math.inf)
    assert (first.kind, first.onset, first.detected, first.in_a_row) == ("nonfinite", 2, 2, 1)
    assert (second.onset, second.detected, second.in_a_row) == (2, 3, 2)
    assert detector.update(4, 2.0, 1.0) is None
    assert detector.update(5, math.nan, 1.0).in_a_row == 1


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 799), st.lists(st.integers(100, 700), max_size=4), st.integers(1, 30))
def test_a_detector_resumed_from_json_reports_what_an_uninterrupted_one_does(at, starts, length):
    values = losses(800)
    for start in starts:
        values[start : start + length] += 3
    values[50] = math.nan
    config = FaultConfig(patience=20)
    whole = SpikeDetector.from_config(config)
    expected = [repr(whole.update(step, loss)) for step, loss in enumerate(values, 1)]
    first = SpikeDetector.from_config(config)
    got = [repr(first.update(step, loss)) for step, loss in enumerate(values[:at], 1)]
    second = SpikeDetector.from_config(config, json.loads(json.dumps(first.state())))
    got += [repr(second.update(step, loss)) for step, loss in enumerate(values[at:], at + 1)]
    assert got == expected


SPIKE = Incident("spike", "malignant", onset=501, detected=601, loss_before=2, loss=6, z=40)
NAN = Incident("nonfinite", "", onset=550, detected=550, loss_before=2, loss=math.nan, in_a_row=1)


def choose(incident, checkpoints=(100, 400, 492, 493, 600), rollbacks=0, skips=(), **fields):
    stream = FunctionStream(lambda index: {}, skips)
    config = FaultConfig(**fields)
    return decide(incident, config, checkpoints, rollbacks, stream.batch_index)


def test_a_rollback_drops_the_batches_of_the_spike_and_no_update_from_them_survives():
    action = choose(SPIKE, spike_action="rollback")
    # Step 493 is the first that is dropped; it reads batch 492, and checkpoint 492 ends before it.
    assert (action.kind, action.to_step, action.batches) == ("rollback", 492, (492, 601))
    assert "malignant loss spike since step 501: 6 after 2" in action.reason
    again = choose(SPIKE, spike_action="defer", skips=((100, 110),))
    assert (again.to_step, again.batches, again.defer) == (492, (502, 611), True)
    stream = FunctionStream(lambda index: {}, (action.batches,))
    assert [stream.batch_index(step) for step in (491, 492, 493)] == [491, 601, 602]


def test_policies_choose_between_going_on_going_back_and_stopping():
    assert choose(None) == CONTINUE
    assert choose(SPIKE).kind == "continue"
    assert (
        choose(dataclasses.replace(SPIKE, outcome="benign"), spike_action="stop").kind == "continue"
    )
    assert choose(SPIKE, spike_action="stop").kind == "stop"
    assert choose(NAN) == Action(
        "continue", "loss or gradient not finite at step 550: update skipped"
    )
    assert choose(NAN, nonfinite="stop").kind == "stop"
    assert choose(NAN, nonfinite="rollback").batches == (541, 550)
    assert choose(dataclasses.replace(NAN, in_a_row=21)).kind == "rollback"


def test_rollbacks_are_limited_and_need_a_checkpoint_before_the_cause():
    stopped = choose(SPIKE, spike_action="rollback", rollbacks=3)
    assert stopped.kind == "stop"
    assert "steps 493 to 601" in stopped.reason
    assert choose(SPIKE, spike_action="rollback", checkpoints=(600,)).kind == "continue"
    lost = choose(NAN, nonfinite="rollback", checkpoints=())
    assert lost.kind == "stop"
    assert "no checkpoint before step 542" in lost.reason


def test_settings_that_make_no_sense_are_refused_by_name():
    with pytest.raises(ValueError, match=r"faults.spike_action='undo'; choose alert, skip"):
        FaultConfig(spike_action="undo")
    with pytest.raises(ValueError, match=r"faults.patience=2 must be at least 3"):
        FaultConfig(patience=2)
    with pytest.raises(ValueError, match=r"faults.z=0 must be positive"):
        FaultConfig(z=0)


@settings(deadline=None)
@given(
    st.integers(20, 60),
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 5)), max_size=3),
    st.integers(0, 59),
)
def test_deferred_batches_come_once_each_at_the_end(steps, lengths, start):
    ranges, at = [], 0
    for gap, length in lengths:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    ranges = tuple(pair for pair in ranges if pair[1] <= steps)
    stream = DeferredStream(FunctionStream(lambda index: {"n": np.array([index])}), ranges, steps)
    order = [int(stream.batch_at(step)["n"][0]) for step in range(steps + 5)]
    moved = [batch for first, stop in ranges for batch in range(first, stop)]
    assert sorted(order) == list(range(steps + 5))
    assert order[steps - len(moved) : steps] == moved
    start = min(start, steps)
    batches = stream.iterate(start)
    assert [int(next(batches)["n"][0]) for _ in range(start, steps)] == order[start:steps]


def test_a_hung_step_is_reported_with_the_stack_of_the_thread_that_hangs(tmp_path, capsys):
    incidents = Incidents(tmp_path / "incidents.jsonl")
    release = threading.Event()

    def hang_here():
        release.wait()

    stuck = threading.Thread(target=hang_here, name="loader", daemon=True)
    stuck.start()
    with Watchdog(incidents, seconds=0.2, long_seconds=0.6) as watchdog:
        watchdog.beat(7, "compile")
        time.sleep(0.35)
        assert incidents.rows() == []
        watchdog.beat(7)
        deadline = time.monotonic() + 10
        while not incidents.rows("hang"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        release.set()
        watchdog.beat(8)
    (hang,) = incidents.rows("hang")
    assert (hang["step"], hang["phase"]) == (7, "step")
    (stack,) = [text for name, text in hang["stacks"].items() if name.startswith("loader")]
    assert "hang_here" in stack
    assert [row["step"] for row in incidents.rows("recovered")] == [8]
    assert "no progress for" in (printed := capsys.readouterr().err)
    assert "hang_here" in printed


def test_a_watchdog_learns_how_long_steps_take(tmp_path):
    watchdog = Watchdog(Incidents(tmp_path / "incidents.jsonl"), seconds=0.05, long_seconds=9)
    for step in range(3):
        watchdog.beat(step)
        time.sleep(0.02)
    assert 0.2 < watchdog.limit("step") < 2
    assert watchdog.limit("evaluation") == 9


LOCKED = """
import ctypes, pathlib, sys
from training.incidents import Incidents
from training.watchdog import Watchdog
with Watchdog(Incidents(pathlib.Path(sys.argv[1])), seconds=0.2) as watchdog:
    watchdog.beat(3)
    ctypes.PyDLL(None).usleep(300_000)
    ctypes.PyDLL(None).usleep(900_000)
"""


@pytest.mark.slow
def test_even_native_code_that_holds_the_interpreter_gets_its_stack_written(tmp_path):
    command = [sys.executable, "-c", LOCKED, str(tmp_path / "incidents.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "Timeout (0:00:00.400000)!" in done.stderr


STOPPING = """
import os, signal, sys, time
from training.signals import GracefulStop
with GracefulStop() as stop:
    print("ready", flush=True)
    while not stop.anywhere():
        time.sleep(0.01)
    print("stopping because of", stop.reason, flush=True)
    time.sleep(float(sys.argv[1]))
print("saved", flush=True)
"""


def stopping(seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING, str(seconds)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_the_run_save_and_end(number):
    process = stopping(0)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output == f"stopping because of {number.name}\nsaved\n"
    assert f"{number.name}: saving after this step" in errors


@pytest.mark.slow
def test_a_second_control_c_ends_at_once():
    """Even while the main thread sits in native code, where Python runs no handlers."""
    process = stopping(600)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopping because of SIGINT\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved" not in output
    assert "ending at once, without saving" in errors


def test_handlers_are_put_back_and_other_threads_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStop() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop.anywhere():
            assert time.monotonic() < deadline
    assert signal.getsignal(signal.SIGTERM) == before
    entered = []
    thread = threading.Thread(target=lambda: entered.append(bool(GracefulStop().__enter__())))
    thread.start()
    thread.join()
    assert entered == [False]


def test_the_slow_process_is_named_by_its_own_time_and_not_by_its_step():
    times = StepTimes()
    for _ in range(5):
        times.add(step_seconds=1.0, waiting_seconds=0.9)
    usual = times.summary(probe=0.010)
    assert gather(usual).tolist() == [pytest.approx([1.0, 0.1, 0.010])]
    everyone = np.tile(usual, (4, 1))
    assert stragglers(everyone) == []
    everyone[2, 1] = 0.25
    everyone[3, 2] = 0.012
    found = stragglers(everyone)
    assert [(slow.process, slow.part) for slow in found] == [(2, "host"), (3, "device")]
    assert "process 2 is slow: its host is busy 250.0 ms, the median is 100.0 ms" in report(
        everyone
    )
    assert re.search(r"no process is slow", report(everyone[:2]))


def test_the_probe_measures_every_device():
    assert 0 < probe_seconds(size=64) < 1
