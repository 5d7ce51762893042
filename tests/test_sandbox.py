"""Untrusted programs are contained, whoever starts them, or refused (room `sandbox/`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from sandbox_escapes import ESCAPES, LIMITS, ROOT, attempt, left_over, marker, pool_or_skip

from sandbox import Limits, Pool, Program, SandboxError

WORKER = ROOT / "tests" / "sandbox_escapes.py"
GENEROUS = replace(LIMITS, wall_seconds=60.0)


@pytest.fixture(scope="module")
def pool():
    os.environ["SECRET_OF_THE_PARENT"] = "must not be seen"
    with pool_or_skip(workers=2) as started:
        yield started
    del os.environ["SECRET_OF_THE_PARENT"]


def in_another_process(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(WORKER), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if "skip" in result:
        pytest.skip(result["skip"])
    return result


@pytest.mark.parametrize("name", ESCAPES)
def test_no_program_gets_out_or_takes_too_much(pool, name):
    result = attempt(pool, name)
    assert result.status == ESCAPES[name][2], (result.detail, result.stdout, result.stderr)
    assert not left_over(marker(name))
    assert len(result.stdout) <= LIMITS.output_bytes
    if name == "counts how far it can fork":
        assert int(result.stdout) == LIMITS.processes - 1


def test_an_ordinary_user_gets_the_same_walls(pool):
    results = in_another_process("ordinary")
    ends = {name: result[0] for name, result in results.items()}
    assert ends == {name: expected for name, (_, _, expected) in ESCAPES.items()}, results
    assert int(results["counts how far it can fork"][1]) == LIMITS.processes - 1


@pytest.mark.parametrize(
    ("call", "wall"), [("unshare", "namespaces"), ("landlock_create_ruleset", "landlock")]
)
def test_a_machine_without_a_wall_is_refused_unless_told_and_results_say_so(pool, call, wall):
    said = in_another_process("without", call)
    assert said["refusal"].startswith("untrusted programs cannot be isolated on this machine")
    assert f"{wall}: " in said["refusal"]
    assert "allow_weaker=True" in said["refusal"]
    assert wall in said["missing"]
    assert said["ends"] == ["timeout", "ok"]
    assert said["left_over"] == 0
    assert "README.md" in said["detail"], "the wall that is left still hides the checkout"
    assert not os.path.exists(said["folder"]) or said["folder"] == "/box"


def test_a_program_gets_its_files_input_and_arguments_and_sees_nothing_of_the_last(pool):
    source = """
import os, sys
from helper import double
print(double(int(input())), sys.argv[1:], open("data/words.txt").read(), sorted(os.listdir()))
print("é" * 3, file=sys.stderr)
open("left.txt", "w").write("behind")
open("/tmp/also.txt", "w").write("in the folder")
sys.exit(7)
"""
    files = {"helper.py": "def double(x): return 2 * x", "data/words.txt": b"\xc3\xbc"}
    program = Program(source, files=files, arguments=("a b",), stdin="21\n")
    for _ in range(3):
        result = pool.run(program, GENEROUS)
        assert result.stdout == "42 ['a b'] ü ['data', 'helper.py', 'main.py']\n"
        assert (result.status, result.exit_code, result.stderr) == ("failed", 7, "ééé\n")
    assert result.isolation.full
    assert 0 < result.cpu_seconds < result.seconds + 1
    assert result.peak_bytes > 2**20


def test_files_that_do_not_fit_are_refused_before_anything_starts(pool):
    with pytest.raises(ValueError, match=r"hold 1004 bytes; Limits.disk_bytes is 1000"):
        pool.run(Program("pass", files={"big": bytes(1000)}), Limits(disk_bytes=1000))
    with pytest.raises(SandboxError, match=r"could not be started: .*File exists"):
        pool.run(Program("pass", files={"a": "file", "a/b": "below it"}), GENEROUS)
    assert pool.run(Program("pass"), GENEROUS).ok


def test_installed_packages_are_there_on_request_only(pool):
    source = "import numpy; print(numpy.arange(4).sum())"
    assert pool.run(Program(source), GENEROUS).detail.startswith("ModuleNotFoundError")
    limits = replace(GENEROUS, memory_bytes=2**31)
    assert pool.run(Program(source, packages=True), limits).stdout == "6\n"


def test_a_crash_a_failed_assertion_and_odd_signals_are_told_apart(pool):
    def ends(source: str) -> tuple:
        result = pool.run(Program(source), GENEROUS)
        return result.status, result.exit_code, result.signal, result.detail

    assert ends("assert 1 == 2, 'no'") == ("failed", 1, "", "AssertionError: no")
    assert ends("import os; os.abort()") == ("killed", None, "SIGABRT", "by SIGABRT")
    assert ends("import os; os.kill(os.getpid(), 40)")[:3] == ("killed", None, "signal 40")
    assert ends("import os; os.close(1); os.close(2)")[0] == "ok"
    assert ends("def f(:")[3].startswith("SyntaxError")


def test_programs_run_side_by_side_and_keep_their_order(pool):
    programs = [Program(f"import time; time.sleep(0.4); print({i})") for i in range(2)]
    began = time.monotonic()
    assert [run.stdout for run in pool.run_all(programs, GENEROUS)] == ["0\n", "1\n"]
    assert time.monotonic() - began < 60


def test_a_launcher_that_dies_is_reported_and_replaced():
    with pool_or_skip() as pool:
        os.kill(pool._workers[0]._process.pid, signal.SIGKILL)
        pool._workers[0]._process.wait()
        with pytest.raises(SandboxError, match="the launcher died"):
            pool.run(Program("pass"))
        assert pool.run(Program("print(1)"), GENEROUS).stdout == "1\n"


def test_killing_the_asking_process_kills_what_it_ran(pool):
    name = marker("orphan")
    code = (
        "import sandbox\n"
        "program = sandbox.Program('import time; time.sleep(60)', arguments=(%r,))\n"
        "sandbox.run(program, sandbox.Limits(wall_seconds=60.0))\n"
    )
    asking = subprocess.Popen([sys.executable, "-c", code % name], cwd=ROOT)
    wait_until(lambda: len(left_over(name)) >= 2)  # the asking process shows the name, too
    asking.kill()
    asking.wait()
    wait_until(lambda: not left_over(name))


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_wrong_limits_and_names_are_refused_by_name():
    with pytest.raises(ValueError, match=r"Limits.processes is 0; it must be a whole number of 1"):
        Limits(processes=0)
    with pytest.raises(ValueError, match=r"Limits.memory_bytes is 1.5; it must be a whole"):
        Limits(memory_bytes=1.5)  # pyright: ignore[reportArgumentType]
    for name in ("../up", "/etc/passwd", "a//b", "", "a/.."):
        with pytest.raises(ValueError, match="a path below the work folder"):
            Program("pass", files={name: ""})
    with pytest.raises(ValueError, match=r"'main.py', which is the name"):
        Program("pass", files={"main.py": ""})
    with pytest.raises(ValueError, match="workers is 0"):
        Pool(workers=0)


def test_the_room_imports_no_jax_and_nothing_of_the_other_rooms():
    code = (
        "import sys, sandbox, sandbox.launcher\n"
        "rooms = {'jax', 'numpy', 'weights', 'model', 'evals', 'serving'} & set(sys.modules)\n"
        "assert not rooms, rooms\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_command_line_checks_the_machine_and_runs_a_file(pool, tmp_path):
    def command(*arguments: str, text: str = "") -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "sandbox", *arguments],
            **{"cwd": ROOT, "input": text, "capture_output": True, "text": True, "check": False},
        )

    checked = command("check")
    assert checked.returncode == 0
    assert "Untrusted programs are isolated." in checked.stdout
    file = tmp_path / "program.py"
    file.write_text("import sys; print(input(), sys.argv[1:]); open('/etc/passwd')")
    ran = command("run", str(file), "x", text="typed")
    assert (ran.returncode, ran.stdout) == (1, "typed ['x']\n")
    assert ran.stderr.splitlines()[-1].startswith("failed: FileNotFoundError")
    assert "No such file" in command("run", str(tmp_path / "none.py")).stderr
