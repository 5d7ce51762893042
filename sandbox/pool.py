"""Confined programs for the process that asks: one at a time, or many side by side.

    with Pool(workers=4) as pool:
        print(pool.run(Program("print(6 * 7)")).stdout)

Each worker is a [launcher](launcher.py), a small process of its own. Before the first program, one
of them runs a probe behind all walls; where a wall cannot be built, or the probe reaches what it
must not, the pool refuses to start unless told `allow_weaker=True`, and then every result says so.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from sandbox import root, wire
from sandbox.program import (
    DEFAULT_LIMITS,
    Execution,
    Isolation,
    Limits,
    Program,
    SandboxError,
    SandboxUnavailable,
    Status,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

_TRUSTED = 2**40  # bytes of a frame between this process and a launcher
_START = "import sys; sys.path.insert(0, {!r}); from sandbox.launcher import main; main()"
_PROBE = """
import os, socket
def attempt(what, action):
    try:
        action()
    except OSError:
        return
    print(what)
attempt("read /etc/passwd", lambda: open("/etc/passwd").close())
attempt("list /home", lambda: os.listdir("/home"))
attempt("write outside its folder", lambda: open("/var/tmp/.sandbox-probe", "x").close())
attempt("open a network socket", lambda: socket.socket().close())
attempt("see other processes", lambda: os.stat("/proc/self"))
"""


class _Worker:
    """The pipes to one launcher."""

    def __init__(self) -> None:
        folder = str(Path(__file__).parent.parent)
        self._process = subprocess.Popen(
            [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _START.format(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        commands = {
            packages: (root.interpreter(packages), "-s", *(() if packages else ("-S",)), "-B")
            for packages in (False, True)
        }
        paths = {packages: root.runtime(packages) for packages in (False, True)}
        self._send({"commands": commands, "paths": paths})

    def ask(self, method: str, *arguments: Any) -> Any:
        """One request; `SandboxError` where the launcher answers with an error, or not at all."""
        assert self._process.stdout is not None
        try:
            self._send((method, *arguments))
            kind, answer = wire.receive(self._process.stdout.fileno(), largest=_TRUSTED)
        except (EOFError, BrokenPipeError):
            raise SandboxError(f"the launcher died: {self._last_words()}") from None
        except BaseException:  # an answer on its way would be taken for that of the next request
            self._process.kill()
            self._process.wait()
            raise
        if kind == "error":
            raise SandboxError(answer)
        return answer

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        wire.send(self._process.stdin.fileno(), message)

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        self._process.kill()
        self._process.wait()
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    @property
    def dead(self) -> bool:
        """Whether the launcher has gone."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End the launcher, and with it what it runs."""
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        self._process.wait()


class Pool:
    """Launchers that run programs side by side. Close it, or use it in a `with`."""

    def __init__(self, workers: int = 1, allow_weaker: bool = False):
        """Start `workers` launchers.

        Raises `SandboxUnavailable` where a wall is missing and `allow_weaker` is false.
        """
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be 1 or more")
        if not sys.platform.startswith("linux"):
            raise SandboxUnavailable(f"the sandbox needs Linux; this is {sys.platform}")
        self._workers = [_Worker()]
        self._threads = ThreadPoolExecutor(workers)
        try:
            self.isolation = self._probe(self._workers[0])
            if not (self.isolation.full or allow_weaker):
                raise SandboxUnavailable(
                    "untrusted programs cannot be isolated on this machine: "
                    + "; ".join(self.isolation.missing)
                    + ". allow_weaker=True runs them behind the walls that are left."
                )
            for _ in range(workers - 1):
                self._start()
        except BaseException:
            self.close()
            raise
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all launchers."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown()

    def _probe(self, worker: _Worker) -> Isolation:
        answer = worker.ask("probe", request(Program(_PROBE), DEFAULT_LIMITS))
        if answer["wait_status"]:
            raise SandboxError(f"the probe failed: {answer['stderr'].decode(errors='replace')}")
        missing = [f"{wall}: {why}" for wall, why in answer["missing"].items()]
        missing += [f"a probe could {what}" for what in answer["stdout"].decode().splitlines()]
        return Isolation(**answer["walls"], missing=tuple(missing))

    def ask(self, method: str, *arguments: Any) -> Any:
        """A launcher's answer, from the first that is free; one that has died is replaced."""
        worker = self._free.get()
        try:
            return worker.ask(method, *arguments)
        finally:
            if worker.dead:
                self._workers.remove(worker)
                worker.close()
                worker = self._start()
            self._free.put(worker)

    def _start(self) -> _Worker:
        worker = _Worker()
        self._workers.append(worker)
        self._probe(worker)
        return worker

    def run(self, program: Program, limits: Limits = DEFAULT_LIMITS) -> Execution:
        """Run one program to its end."""
        return execution(self.ask("run", request(program, limits)), limits, self.isolation)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function(item)` for all items, as many at a time as there are workers, in order."""
        return list(self._threads.map(function, items))

    def run_all(
        self,
        programs: Sequence[Program],
        limits: Limits = DEFAULT_LIMITS,
    ) -> list[Execution]:
        """Run programs side by side, and once more alone those whose wall time ran out unused."""
        first = self.map(lambda program: self.run(program, limits), programs)
        return [
            self.run(program, limits) if crowded_out(result, limits) else result
            for program, result in zip(programs, first, strict=True)
        ]


def crowded_out(result: Execution, limits: Limits) -> bool:
    """Whether a program may have run out of wall time because the machine was busy."""
    return result.status == "timeout" and result.cpu_seconds < limits.cpu_seconds


def run(
    program: Program,
    limits: Limits = DEFAULT_LIMITS,
    allow_weaker: bool = False,
) -> Execution:
    """Run one program in a sandbox made for it. Many are cheaper in a `Pool`."""
    with Pool(allow_weaker=allow_weaker) as pool:
        return pool.run(program, limits)


def request(program: Program, limits: Limits) -> dict[str, Any]:
    """A program in the launcher's terms."""
    files = {name: _bytes(text) for name, text in program.files.items()}
    files["main.py"] = _bytes(program.source)
    total = sum(map(len, files.values()))
    if total > limits.disk_bytes:
        raise ValueError(
            f"the program's files hold {total} bytes; Limits.disk_bytes is {limits.disk_bytes}"
        )
    return {
        "files": files,
        "arguments": tuple(program.arguments),
        "stdin": _bytes(program.stdin),
        "packages": program.packages,
        "limits": asdict(limits),
    }


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def execution(answer: dict[str, Any], limits: Limits, isolation: Isolation) -> Execution:
    """What a launcher says of a program, with the status it comes to."""
    if answer["failure"] is not None:
        raise SandboxError(f"the program could not be started: {answer['failure'][1]}")
    code = os.waitstatus_to_exitcode(answer["wait_status"]) if answer["wait_status"] >= 0 else -9
    status, detail = _status(answer, code, limits.cpu_seconds)
    return Execution(
        status=status,
        exit_code=code if code >= 0 else None,
        signal=_signal_name(code),
        **{name: answer[name].decode("utf-8", "replace") for name in ("stdout", "stderr")},
        **{name: answer[name] for name in ("seconds", "cpu_seconds", "peak_bytes")},
        detail=detail,
        isolation=isolation,
    )


def _signal_name(code: int) -> str:
    known = {int(number): number.name for number in signal.Signals}
    return known.get(-code, f"signal {-code}") if code < 0 else ""


def _status(answer: dict[str, Any], code: int, cpu_seconds: int) -> tuple[Status, str]:
    if answer["cause"]:
        return answer["cause"], answer["detail"]
    if code == 0:
        return "ok", ""
    spent = answer["cpu_seconds"] >= cpu_seconds
    if -code == signal.SIGXCPU or (-code == signal.SIGKILL and spent):
        return "timeout", "its CPU time was used up"
    if code < 0:
        return "killed", f"by {_signal_name(code)}"
    last = answer["stderr"].decode(errors="replace").strip().splitlines()[-1:]
    if last and last[0].startswith("MemoryError"):
        return "memory", "an allocation was refused"
    return "failed", last[0] if last else f"exit code {code}"
