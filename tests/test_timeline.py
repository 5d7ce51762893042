"""The timeline of a run: what it makes of four ranks whose faults are known."""

from __future__ import annotations

import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.__main__ import main
from training.json_lines import extend, read
from training.timeline import Timeline
from training.timeline_report import (
    chrome_trace,
    clock_offsets,
    drifts,
    grid,
    load,
    slow,
    theil_sen,
)

STEPS = 60
SKEW = {0: 0.0, 1: 0.0, 2: -3.5, 3: 0.25}
"""Seconds that the clock of a rank is ahead."""


def rank_rows(rank: int) -> list[dict]:
    """Steps of 100 ms; rank 1 is busy for 30 ms of each instead of 10, the data of rank 3 grows by
    0.4 ms a step; every tenth step all wait for a checkpoint of a second.
    """
    rows, now = [{"process": rank, "host": f"node-{rank}", "pid": 1, "time": 0.0}], 1000.0
    for step in range(1, STEPS + 1):
        data = 0.005 + (4e-4 * step if rank == 3 else 0.0)
        host = 0.025 if rank == 1 else 0.005
        spans = [("data", data), ("host", host), ("dispatch", 0.001)]
        spans += [("wait", 0.1 - data - host - 0.001)]
        spans += [("checkpoint", 1.0)] if step % 10 == 0 else []
        begins = np.cumsum([0.0] + [seconds for _, seconds in spans])
        rows.append(
            {
                "step": step,
                "steps": 1,
                "seconds": float(begins[-1]),
                "spans": dict(spans),
                "start": now + SKEW[rank],
                "last": [
                    [name, float(b), s] for (name, s), b in zip(spans, begins[:-1], strict=True)
                ],
            }
        )
        now += float(begins[-1])
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "timeline").mkdir()
    for rank in SKEW:
        extend(folder / f"timeline/{rank}.jsonl", rank_rows(rank))
    return folder


def test_the_rank_that_holds_the_others_up_is_named_though_all_steps_take_as_long(run):
    ranks = load(run / "timeline")
    assert len({round(rank.seconds(row), 6) for rank in ranks for row in rank.rows}) == 1
    (found,) = [each for each in slow(ranks) if each.process != 3]
    assert (found.process, found.part) == (1, "host")
    assert found.seconds == pytest.approx(0.030, rel=1e-5)


def test_a_span_that_grows_is_found_with_its_slope_and_those_that_are_long_are_not(run):
    (drift,) = drifts(load(run / "timeline"))
    assert (drift.process, drift.span) == (3, "data")
    assert drift.slope == pytest.approx(4e-4, rel=1e-6)
    assert "on node-3 grows by 400.00 us a step" in str(drift)


def test_clocks_are_aligned_by_the_waits_that_end_together(run):
    ranks = load(run / "timeline")
    offsets = clock_offsets(ranks)
    assert offsets == pytest.approx({rank: -skew for rank, skew in SKEW.items()}, abs=1e-6)
    events = [event for event in chrome_trace(ranks)["traceEvents"] if event["ph"] == "X"]
    ends = {
        (event["pid"], event["args"]["step"]): event["ts"] + event["dur"]
        for event in events
        if event["name"] == "wait"
    }
    for step in (1, 30, STEPS):
        assert np.ptp([ends[rank, step] for rank in SKEW]) < 1.0  # microseconds
    for rank in SKEW:
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["pid"] == rank)
        assert all(a[1] <= b[0] + 0.2 for a, b in itertools.pairwise(own))


def test_the_heat_map_shows_ranks_by_steps_and_leaves_checkpoints_out(run, capsys):
    steps, busy = grid(load(run / "timeline"), "busy")
    assert busy.shape == (4, STEPS)
    assert list(steps[:3]) == [1, 2, 3]
    np.testing.assert_allclose(busy[1], 30.0, rtol=1e-6)
    np.testing.assert_allclose(busy[0], 10.0, rtol=1e-6)
    assert main(["timeline", str(run), f"--out={run / 'shown'}"]) == 0
    assert "process 1 is slow" in capsys.readouterr().out
    assert (run / "shown/heatmap.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((run / "shown/trace.json").read_text())["displayTimeUnit"] == "ms"


def test_steps_that_a_restart_did_again_count_once_and_a_missing_timeline_is_named(tmp_path):
    rows = rank_rows(0)
    (tmp_path / "timeline").mkdir()
    again = [rows[0] | {"host": "spare"}, *rows[21:]]
    extend(tmp_path / "timeline/0.jsonl", [*rows[:31], *again])
    (rank,) = load(tmp_path / "timeline")
    assert rank.host == "spare"
    assert [row["step"] for row in rank.rows] == list(range(1, STEPS + 1))
    assert main(["timeline", str(tmp_path / "none")]) == 2
    with pytest.raises(ValueError, match="timeline_every"):
        load(tmp_path / "none")


def test_spans_cover_all_time_and_a_row_adds_up_its_steps(tmp_path):
    timeline = Timeline(tmp_path / "timeline", every=3, process=2)
    start = time.perf_counter()
    for step in range(1, 8):
        for name in ("host", "dispatch", "wait"):
            timeline.enter(name)
        timeline.step(step)
    elapsed = time.perf_counter() - start
    timeline.write()
    header, *rows = read(tmp_path / "timeline/2.jsonl")
    assert header["process"] == 2
    assert [(row["step"], row["steps"]) for row in rows] == [(3, 3), (6, 3)]
    for row in rows:
        assert sum(row["spans"].values()) == pytest.approx(row["seconds"], abs=1e-5)
        names = [name for name, _, _ in row["last"]]
        assert names == ["data", "host", "dispatch", "wait"]
    assert sum(row["seconds"] for row in rows) <= elapsed + 0.01
    assert timeline.current == "data"
    silent = Timeline(tmp_path / "none", every=0, process=0)
    silent.step(1)
    silent.write()
    assert not (tmp_path / "none").exists()


@settings(deadline=None, max_examples=25)
@given(slope=st.floats(-10, 10), count=st.integers(9, 20), outlier=st.floats(1e3, 1e6))
def test_the_slope_is_that_of_the_line_whatever_one_point_is(slope, count, outlier):
    x = np.arange(count, dtype=float)
    y = slope * x
    y[count // 2] += outlier
    assert theil_sen(x.tolist(), y.tolist()) == pytest.approx(slope, abs=1e-6)
