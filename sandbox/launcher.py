"""The process that starts and watches confined programs; one request at a time, over its pipes.

It is apart from the process that asks for two reasons: that one may run JAX, whose threads make a
fork unsafe, and a small process forks fast. It imports the standard library alone. When the pipe
to the asking process closes, it kills what runs and ends; when it is killed itself, the kernel
kills what runs.

A request is one job, or a pair: a candidate that serves calls on descriptor 3 and a checker that
makes them on its own descriptor 3, reads a fresh nonce from standard input and writes its report,
which starts with the nonce, to descriptor 4.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from sandbox import confine, landlock, linux, root, seccomp, wire
from sandbox.program import SandboxError

TICK = 0.05
"""Seconds between two looks at memory."""
GRACE = 0.25
"""Seconds that a candidate has to end once its checker has ended."""
LARGEST_REPORT = 2**16

_ASKING = 0  # standard input, whose end means that the asking process has gone


class Running:
    """One confined program, from its fork until its last process has gone."""

    def __init__(self, job: confine.Job, stdin: bytes, extra: Sequence[int] = ()):
        self.limits = job.limits
        self.output = {"stdout": bytearray(), "stderr": bytearray()}
        self.cause = self.detail = ""
        self.failure: tuple[str, str] | None = None
        self.ended: tuple[int, float, int] | None = None
        self._handle = -1
        self._frames = bytearray()
        self._started = time.monotonic()
        self._finished = 0.0
        ends = {name: os.pipe() for name in (*self.output, "report")}
        given = _input(stdin)
        writers = {name: write for name, (_, write) in ends.items()}
        inherited = (given, writers["stdout"], writers["stderr"], *extra)
        job = confine.Job(**{**vars(job), "descriptors": inherited})
        self.pid = confine.start(job, writers["report"])
        for descriptor in (given, *writers.values(), *extra):
            os.close(descriptor)
        self.readers = {read: name for name, (read, _) in ends.items()}

    @property
    def done(self) -> bool:
        """Whether every pipe has closed: no process of the sandbox is left."""
        return not self.readers

    def read(self, descriptor: int) -> bool:
        """Take what a pipe holds; whether it is still open."""
        data = os.read(descriptor, 2**16)
        name = self.readers[descriptor]
        if not data:
            os.close(descriptor)
            del self.readers[descriptor]
            if self.done:
                self._reap()
        elif name == "report":
            self._frames += data
            self._take_frames()
        else:
            self._take_output(name, data)
        return bool(data)

    def _take_output(self, name: str, data: bytes) -> None:
        room = int(self.limits["output_bytes"]) - len(self.output[name])
        self.output[name] += data[:room]
        if len(data) > room:
            self.stop("output", f"more than {self.limits['output_bytes']} bytes on {name}")

    def _take_frames(self) -> None:
        while len(self._frames) >= 8:
            end = 8 + int.from_bytes(self._frames[:8], "big")
            if len(self._frames) < end:
                return
            kind, *rest = wire.decode(bytes(self._frames[8:end]))
            del self._frames[:end]
            if kind == "error":
                self.failure = self.failure or (rest[0], rest[1])
            elif kind == "started":
                with contextlib.suppress(ProcessLookupError):
                    self._handle = os.pidfd_open(rest[0])
                if self.cause:
                    self._kill()
            else:
                self.ended = (rest[0], rest[1], rest[2])
                self._finished = time.monotonic()

    def tick(self) -> None:
        """Look at the limits that only a watcher can hold."""
        if self.ended:
            return
        used = time.monotonic() - self._started
        if used > self.limits["wall_seconds"]:
            self.stop("timeout", f"more than {self.limits['wall_seconds']:g} s of wall time")
        elif used > TICK:
            resident = _resident(self.pid)
            if resident > self.limits["memory_bytes"]:
                self.stop("memory", f"{resident} bytes resident in all its processes")

    def stop(self, cause: str, detail: str) -> None:
        """End the program and all it started; the first cause counts."""
        if not self.cause:
            self.cause, self.detail = cause, detail
            self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._handle >= 0:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _reap(self) -> None:
        _, _, used = os.wait4(self.pid, 0)
        if not self.ended:  # its first process was killed, and could not tell
            self.ended = (-1, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
        self._finished = self._finished or time.monotonic()
        if self._handle >= 0:
            os.close(self._handle)

    def result(self) -> dict[str, Any]:
        """What `pool` makes an `Execution` of."""
        assert self.ended is not None
        status, cpu_seconds, peak = self.ended
        return {
            **{name: bytes(data) for name, data in self.output.items()},
            **{"cause": self.cause, "detail": self.detail, "failure": self.failure},
            **{"wait_status": status, "cpu_seconds": cpu_seconds, "peak_bytes": peak},
            "seconds": self._finished - self._started,
        }


def _input(data: bytes) -> int:
    """A descriptor that reads `data` from its beginning."""
    if not data:
        return os.open("/dev/null", os.O_RDONLY)
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _resident(pid: int) -> int:
    """Bytes of memory of their own that the descendants of a process hold."""
    pages, found = 0, confine.children(pid)
    while found:
        pid = found.pop()
        found += confine.children(pid)
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
            pages += resident - shared
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch(runs: Sequence[Running], report: int = -1, checker: Running | None = None) -> bytes:
    """Serve all pipes until every program has gone; returns what came on `report`."""
    outer = {run.pid for run in runs}
    received, deadline = bytearray(), float("inf")
    with selectors.DefaultSelector() as selector:
        for run in runs:
            for descriptor in run.readers:
                selector.register(descriptor, selectors.EVENT_READ, run)
        if report >= 0:
            selector.register(report, selectors.EVENT_READ, None)
        selector.register(_ASKING, selectors.EVENT_READ, None)
        while not all(run.done for run in runs):
            for key, _ in selector.select(TICK):
                if key.fd == _ASKING:
                    raise EOFError("the asking process has gone")
                if isinstance(key.data, Running):
                    open_still = key.data.read(key.fd)
                else:
                    data = os.read(report, LARGEST_REPORT)
                    received += data[: LARGEST_REPORT - len(received)]
                    open_still = bool(data)
                if not open_still:
                    selector.unregister(key.fd)
            if checker is not None and checker.done:
                deadline = min(deadline, time.monotonic() + GRACE)
            for run in runs:
                run.tick()
                if time.monotonic() > deadline and not run.ended:
                    run.stop("stopped", "the checker had ended")
            if any(run.cause and not run.done for run in runs):
                confine.end_children(spare=outer)  # where no namespace died with the first process
    return bytes(received)


class Launcher:
    """Runs jobs, each behind the walls that this machine can build."""

    def __init__(self, settings: dict[str, Any]):
        self._commands: dict[bool, tuple[str, ...]] = settings["commands"]
        self._paths: dict[bool, dict[str, str]] = settings["paths"]
        self.missing: dict[str, str] = {}
        self.walls = confine.Walls(True, landlock.version(), seccomp.known())
        if not self.walls.landlock:
            self.missing["landlock"] = "the kernel offers none (Linux 5.13 or newer does)"
        if not self.walls.seccomp:
            self.missing["seccomp"] = "the system calls of this kind of processor are not known"
        if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            self.missing["memory"] = "the kernel lists no children, so only each process is bounded"

    def probe(self, request: dict[str, Any]) -> dict[str, Any]:
        """Build walls around a real program; a wall that cannot be built is left out, and noted."""
        while True:
            result = self.run(request)
            if result["failure"] is None:
                return {**result, "walls": vars(self.walls), "missing": self.missing}
            wall, message = result["failure"]
            if not vars(self.walls).get(wall):
                raise SandboxError(f"the sandbox does not start: {message}")
            self.missing[wall] = message
            off = 0 if wall == "landlock" else False
            self.walls = confine.Walls(**{**vars(self.walls), wall: off})

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """One program alone."""
        with self._job(request) as job:
            running = Running(job, request["stdin"])
            self._watched([running])
            return running.result()

    def pair(self, candidate: dict[str, Any], checker: dict[str, Any]) -> dict[str, Any]:
        """A candidate and its checker, side by side in two sandboxes, joined by a socket.

        With `candidate` empty, the checker alone. The candidate's processes are forked before the
        nonce exists, so that no memory they inherit holds it.
        """
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair()
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            runs: list[Running] = []
            if candidate:
                job = stack.enter_context(self._job(candidate))
                runs.append(Running(job, b"", (theirs.detach(),)))
            else:
                theirs.close()
            nonce = os.urandom(16).hex().encode()
            job = stack.enter_context(self._job(checker))
            examiner = Running(job, nonce, (ours.detach(), writer))
            report = self._watched([*runs, examiner], reader, examiner)
            valid = report.startswith(nonce)
            return {
                "candidate": runs[0].result() if runs else {},
                "checker": examiner.result(),
                "report": report[len(nonce) :] if valid else b"",
            }

    def _watched(self, runs: Sequence[Running], *report: Any) -> bytes:
        try:
            return watch(runs, *report)
        except BaseException:
            for run in runs:
                run.stop("stopped", "the launcher ended")
            raise

    @contextlib.contextmanager
    def _job(self, request: dict[str, Any]):
        packages = request["packages"]
        box = root.BOX
        if not self.walls.namespaces:
            box = tempfile.mkdtemp(prefix="sandbox-")
            if os.geteuid() == 0:
                os.chown(box, confine.USER, confine.USER)
        try:
            yield confine.Job(
                walls=self.walls,
                command=(*self._commands[packages], "main.py", *request["arguments"]),
                paths=self._paths[packages],
                box=box,
                files=request["files"],
                limits=request["limits"],
                descriptors=(),
            )
        finally:
            if box != root.BOX:
                shutil.rmtree(box, ignore_errors=True)


def main() -> None:
    """Answer requests until the asking process closes the pipe.

    Frames of `wire`: first the settings, then `(method, argument, ...)`, each answered by
    `("ok", result)` or `("error", message)`.
    """
    answers = os.dup(1)
    os.dup2(2, 1)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.suppress(EOFError):
        launcher = Launcher(wire.receive(0))
        while True:
            method, *arguments = wire.receive(0, largest=2**40)
            try:
                answer = ("ok", getattr(launcher, method)(*arguments))
            except (OSError, SandboxError) as error:
                answer = ("error", str(error))
            wire.send(answers, answer)
