"""A supervised run of real processes on loopback: killed, stopped, slowed, its hosts broken."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from child_flags import cpu_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_text

from model.checkpoint import load
from training.__main__ import main
from training.blame import Seen, Verdict, judge
from training.fleet import choose
from training.heartbeat import ORPHANED
from training.json_lines import read
from training.launchers import LAUNCHERS, free_port, make_launcher
from training.supervisor import Supervisor
from training.supervisor_config import SupervisorConfig
from training.timeline_report import load as load_timeline
from training.timeline_report import show, slow

ROOT = Path(__file__).parent.parent
HOSTS = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]

CONFIG = """
import os
import time
from pathlib import Path

from tiny import tiny_values
from training.setup import Functions

first, last = Functions.hash, time.monotonic()


def slowly(self, batch):
    global last
    if os.environ.get("SHEAF_PROCESS") == "1":
        time.sleep(min(time.monotonic() - last + 0.01, 1.0))
    last = time.monotonic()
    return first(self, batch)


def get_config():
    Functions.hash = slowly
    fields = dict(train__steps={steps}, checkpoint__every=5, train__timeline_every=1)
    fields |= dict(data__validation_fraction=0.0, sample__tokens=0)
    return tiny_values(Path({text!r}), **fields)
"""
"""Process 1 sleeps in every step as long as the rest of the step takes."""

SRUN = """#!/bin/bash
# Slurm's srun with the nodes on loopback. Devices of a host of which a file says so do not come up.
for word in "$@"; do
    case "$word" in
        --nodelist=*) host=${word#--nodelist=}; shift ;;
        --*) shift ;;
        *) break ;;
    esac
done
export SLURM_STEP_NODELIST=$host SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0
[ -e "$BROKEN/$host" ] && export JAX_PLATFORMS=tpu
exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) printf '%s\\n' ${3//,/ } ;;
    *) echo "$@" >> "$BROKEN/scontrol" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a Slurm job on three loopback hosts."""
    tools, broken = tmp_path / "tools", tmp_path / "broken"
    tools.mkdir()
    broken.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "PYTHON": sys.executable,
        "BROKEN": str(broken),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_devices(1),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": ",".join(HOSTS),
    }


def start(
    environment: dict[str, str], config: Path, workdir: Path, sizes: str = "2,1"
) -> subprocess.Popen[str]:
    # A port that is free now, so that tests side by side do not share one.
    flags = f"--heartbeat-seconds=0.5 --timeout-seconds=8 --health=failure --port={free_port()}"
    flags += " --health-flags=--matmul-size=64"
    return subprocess.Popen(
        ["bash", "launch/slurm.sbatch", f"--config={config}", f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment | {"SIZES": sizes, "SUPERVISE": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(
    run: Path, step: int, attempt: int, job: subprocess.Popen[str], workers: int = 2
) -> dict:
    """The heartbeats of an attempt that has come to a step, by process."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and job.poll() is None:
        paths = list((run / f"supervisor/{attempt}/heartbeats").glob("*.json"))
        beats = [json.loads(path.read_text()) for path in paths]
        if len(beats) == workers and all(beat.get("step", 0) >= step for beat in beats):
            return {beat["process"]: beat for beat in beats}
        time.sleep(0.05)
    job.terminate()
    raise AssertionError(f"no step {step} in attempt {attempt}:\n{job.communicate()[0]}")


@pytest.mark.slow
def test_a_killed_a_stopped_and_a_broken_host_cost_a_checkpoint_interval_and_no_bit(
    tmp_path, slurm
):
    text = write_text(tmp_path / "text")
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(text=str(text), steps=40))
    run = tmp_path / "run"
    job = start(slurm, config, run)
    try:
        killed = wait_for_step(run, 8, 0, job)[1]
        assert killed["host"] == HOSTS[1]
        (tmp_path / "broken" / HOSTS[1]).touch()
        os.kill(killed["pid"], signal.SIGKILL)
        stopped = wait_for_step(run, 18, 1, job)[0]
        os.kill(stopped["pid"], signal.SIGSTOP)
        output = job.communicate(timeout=300)[0]
    finally:
        job.kill()
    assert job.returncode == 0, output

    first, second = (row for row in read(run / "incidents.jsonl") if row["kind"] == "failure")
    assert (first["what"], first["suspects"]) == ("exit", [HOSTS[1]])
    assert "SIGKILL" in first["reason"]
    assert (second["what"], second["suspects"]) == ("hang", [HOSTS[0]])
    assert max(first["steps_lost"], second["steps_lost"]) <= 5
    blocked = [row for row in read(run / "incidents.jsonl") if row["kind"] == "blocked"]
    assert [row["host"] for row in blocked] == [HOSTS[1]]
    assert "tpu" in blocked[0]["reason"]
    state = json.loads((run / "supervisor/state.json").read_text())
    assert [row["hosts"] for row in state["attempts"]] == [
        [HOSTS[0], HOSTS[1]],
        [HOSTS[0], HOSTS[2]],
        [HOSTS[0], HOSTS[2]],
    ]
    assert 0 < state["effective_time"] < 1

    assert "this attempt is over" in (run / "supervisor/1/1.log").read_text()

    rows = read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    slow_rows = [row for row in read(run / "incidents.jsonl") if row["kind"] == "straggler"]
    assert {row["slow_process"] for row in slow_rows} == {1}
    assert [(each.process, each.part) for each in slow(load_timeline(run / "timeline"))] == [
        (1, "host")
    ]
    assert "process 1 is slow: its host is busy" in show(run)

    assert_equal_params(run, undisturbed(config, tmp_path / "whole", slurm))


@pytest.mark.slow
def test_a_supervisor_that_is_asked_to_stop_lets_its_workers_save(tmp_path, slurm):
    text = write_text(tmp_path / "text")
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(text=str(text), steps=4000))
    run = tmp_path / "run"
    job = start(slurm | {"SLURM_JOB_NODELIST": HOSTS[0], "REQUEUE": "1"}, config, run, sizes="1")
    try:
        wait_for_step(run, 7, 0, job, workers=1)
        job.send_signal(signal.SIGTERM)
        output = job.communicate(timeout=120)[0]
    finally:
        job.kill()
    assert job.returncode == 3, output
    assert "stopped (SIGTERM)" in output
    saved = read(run / "metrics.jsonl")[-1]["step"]
    assert (run / f"checkpoints/{saved:08d}").is_dir()
    assert (tmp_path / "broken/scontrol").read_text() == "requeue 4711\n"


def undisturbed(config: Path, workdir: Path, environment: dict[str, str]) -> Path:
    """The same run on as many processes, without a supervisor and without faults."""
    flags = [f"--config={config}", f"--workdir={workdir}"]
    flags += [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2"]
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST"):
        environment = {key: value for key, value in environment.items() if key != name}
    workers = [
        subprocess.Popen(
            [sys.executable, "train.py", *flags, f"--process-id={i}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for i in range(2)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    return workdir


def assert_equal_params(one: Path, other: Path) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        load(one).params,
        load(other).params,
    )


QUICKSTART = ["--", "train.py", "--config=configs/quickstart.py"]


def test_hosts_that_all_fail_their_check_are_not_left_out_for_good(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--hosts=a,b", "--launcher=false {host}", *QUICKSTART, f"--workdir={tmp_path}"]
    assert main(["supervise", *flags]) == 2
    assert "all 2 hosts fail their health check" in capsys.readouterr().err
    assert not (tmp_path / "supervisor/state.json").exists()


def test_a_run_that_never_comes_up_is_given_up_after_as_many_tries_as_were_allowed(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    flags = ["--hosts=a,b", "--launcher=false {host}", "--health=never", "--max-restarts=2"]
    flags += ["--backoff-seconds=0.01", "--heartbeat-seconds=0.1", *QUICKSTART]
    assert main(["supervise", *flags, f"--workdir={tmp_path}"]) == 1
    assert "3 attempts in a row brought no new checkpoint" in capsys.readouterr().out
    rows = read(tmp_path / "incidents.jsonl")
    assert [row["kind"] for row in rows] == ["failure"] * 3 + ["given up"]
    assert "a" in rows[0]["suspects"]


def test_workers_that_a_lost_supervisor_has_left_end_before_others_begin(tmp_path):
    beats = tmp_path / "supervisor/0/heartbeats"
    beats.mkdir(parents=True)
    program = "import time; from training.heartbeat import Heartbeat; from pathlib import Path"
    program += f"\nwith Heartbeat(Path({str(beats)!r}), 0, 0.2): time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (beats / "0.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        config = SupervisorConfig(("a",), heartbeat_seconds=0.2)
        Supervisor(config, ("train.py",), tmp_path)._take_up()
        assert worker.wait(timeout=30) == ORPHANED
    finally:
        worker.kill()
        worker.communicate()


def beat(step: int, span: str = "wait", **facts) -> dict:
    return {"step": step, "span": span, "phase": "step", "waited": 0.1, "late": False, **facts}


def seen(*beats: dict, **changes) -> list[Seen]:
    return [Seen(i, f"host{i}", heartbeat=facts, **changes) for i, facts in enumerate(beats)]


def test_the_one_that_says_nothing_is_the_suspect_and_those_that_wait_for_it_are_not():
    workers = seen(beat(7), beat(7), beat(7))
    assert judge(workers, 30, 0.0) is None
    stopped = [*workers[:2], Seen(2, "host2", silent=31, heartbeat=beat(7))]
    verdict = judge(stopped, 30, 0.0)
    assert verdict is not None
    assert (verdict.kind, verdict.suspects) == ("hang", (2,))
    assert "host2 has said nothing for 31" in verdict.reason


def test_a_worker_that_compiles_may_be_silent_for_longer():
    workers = [Seen(0, "a", silent=100, heartbeat=beat(0, phase="compile")), *seen(beat(0))]
    assert judge(workers, 30, 0.0) is None
    assert judge(workers, 5, 0.0) is not None


def test_where_all_hearts_beat_the_one_that_waits_for_nobody_holds_the_others_up():
    late = {"waited": 200.0, "late": True}
    stuck = beat(7, "data", stack=["reader.py:3 read"], **late)
    verdict = judge(seen(beat(7, **late), stuck, beat(7, "dispatch", **late)), 30, 0.0)
    assert verdict is not None
    assert verdict.suspects == (1,)
    assert "reader.py:3 read" in verdict.reason
    verdict = judge(seen(beat(7, **late), beat(6, **late)), 30, 0.0)
    assert verdict is not None
    assert verdict.suspects == (1,)
    verdict = judge(seen(beat(7, **late), beat(7, **late)), 30, 0.0)
    assert verdict == Verdict("hang", (), "no step for 200.0 s")


@pytest.mark.parametrize("status", [-9, 137, -11, 1])
def test_who_ended_by_itself_is_the_suspect_and_not_those_that_lost_a_peer(status):
    died = Seen(1, "b", status, ended=5.1)
    others = [Seen(0, "a", -6, ended=5.0), Seen(2, "c", 2, ended=5.1)]
    verdict = judge([others[0], died, others[1]], 30, 6.0)
    assert verdict is not None
    assert (verdict.kind, verdict.suspects) == ("exit", (1,))


def test_a_host_without_power_is_the_suspect_though_the_others_end_first():
    gone = Seen(1, "b", silent=11.0, heartbeat=beat(7))
    others = [Seen(0, "a", 2, ended=5.0), Seen(2, "c", -6, ended=5.2)]
    assert judge([others[0], gone, others[1]], 30, 14.0) is None
    verdict = judge([others[0], gone, others[1]], 30, 16.0)
    assert verdict is not None
    assert (verdict.kind, verdict.suspects) == ("exit", (1,))
    assert "the others have lost it" in verdict.reason


def kind(*workers: Seen, now: float = 1.5) -> tuple[str, tuple[int, ...]] | None:
    verdict = judge(workers, 30, now)
    return verdict and (verdict.kind, verdict.suspects)


def test_only_input_that_is_wrong_for_all_ends_the_run_without_another_try():
    assert kind(Seen(0, "a", 2, 1.0), Seen(1, "b", 2, 1.2)) == ("input", ())
    assert kind(Seen(0, "a", 2, 1.0), Seen(1, "b")) is None
    assert kind(Seen(0, "a", 2, 1.0), Seen(1, "b"), now=12.0) == ("exit", (0,))
    assert kind(Seen(0, "a", 0), Seen(1, "b", 0)) == ("done", ())
    assert kind(Seen(0, "a", 3), Seen(1, "b", 3)) == ("interrupted", ())


def test_a_spare_takes_the_place_of_a_suspect_and_fewer_hosts_go_on_where_there_is_none():
    assert choose((), "abcd", (), (3, 2)) == ("a", "b", "c")
    assert choose("abc", "abcd", {"b"}, (3, 2)) == ("a", "d", "c")
    assert choose("abc", "acd", (), (3, 2)) == ("a", "d", "c")
    assert choose("adc", "ac", (), (3, 2)) == ("a", "c")
    assert choose("abc", "abc", {"b"}, (3, 2)) == ("a", "b", "c")
    assert choose("abc", "abc", {"b"}, (2,)) == ("a", "c")
    assert choose("ac", "c", (), (3, 2)) == ()
    assert choose("abc", "ac", {"a"}, ()) == ("a", "c")


@settings(deadline=None)
@given(
    pool=st.lists(st.sampled_from("abcdefgh"), unique=True),
    before=st.lists(st.sampled_from("abcdefgh"), unique=True),
    suspects=st.sets(st.sampled_from("abcdefgh")),
    sizes=st.lists(st.integers(1, 8)),
)
def test_hosts_are_chosen_once_from_the_pool_and_those_that_stay_keep_their_number(
    pool, before, suspects, sizes
):
    chosen = choose(before, pool, suspects, sizes)
    fitting = [size for size in sizes or (len(pool),) if size <= len(pool)]
    assert len(chosen) == (fitting[0] if fitting else 0)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(pool)
    for number, host in enumerate(before[: len(chosen)]):
        assert host not in chosen or chosen[number] == host
    if any(host in suspects for host in chosen):
        assert set(pool) - suspects <= set(chosen)


def test_a_command_reaches_a_shell_of_another_host_as_it_was_given(tmp_path):
    fake = tmp_path / "ssh"
    fake.write_text('#!/bin/bash\n[ "$4" = far ] && exec bash -c "$5"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    command = LAUNCHERS["ssh"].command(
        "far", ["printf", "%s|%s|%s", "a b", "$HOME", "quo\"te'"], {"NAME": "x y"}
    )
    assert command[:5] == ["ssh", "-tt", "-o", "BatchMode=yes", "far"]
    ran = subprocess.run([str(fake), *command[1:]], capture_output=True, text=True, check=True)
    assert ran.stdout == "a b|$HOME|quo\"te'"
    assert "SLURM_LOCALID" in command[-1]
    kubectl = make_launcher("kubectl exec {host} --")
    assert kubectl.command("pod-1", ["python"], {})[:4] == ["kubectl", "exec", "pod-1", "--"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts=a,b"], "-- train.py --config=FILE"),
        (["--hosts=a,a", "--", "train.py", "--config=configs/quickstart.py"], "each host once"),
        (
            ["--hosts=a", "--sizes=2", "--", "train.py", "--config=configs/quickstart.py"],
            "size 2 is not between 1 and the 1 hosts",
        ),
        (
            ["--hosts=a", "--launcher=shh", "--", "train.py", "--config=configs/quickstart.py"],
            "nearest: ssh",
        ),
        (
            ["--hosts=a", "--", "train.py", "--config=configs/quickstart.py", "--process-id=0"],
            "--process-id is no flag of a supervised run",
        ),
        (["--hosts=a", "--", "train.py", "--config=configs/quickstrat.py"], "quickstrat"),
    ],
)
def test_wrong_flags_are_named_before_anything_starts(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["supervise", *arguments]) == 2
    assert message in capsys.readouterr().err
