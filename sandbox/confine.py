"""From a fork of the launcher to a confined Python: three processes, each behind more walls.

The *outer* process leaves the shared namespaces and builds the new root. Its child, the *first*
process of the new process namespace, runs nothing foreign: it starts the program, waits for it,
reports how it ended and exits, upon which the kernel kills whatever the program left behind. The
*program's* process puts on limits, Landlock and the filter, and becomes Python.

All three report on one pipe, in frames of `wire`; what goes wrong is told with the wall it was
about, so that the launcher knows which one this machine cannot build.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

from sandbox import landlock, linux, root, seccomp, wire

USER = 65534
"""The user inside, and outside where root starts the sandbox: "nobody"."""

_NAMESPACES = linux.NEW_MOUNT | linux.NEW_PID | linux.NEW_NET | linux.NEW_IPC | linux.NEW_UTS
_HIGH = 64  # descriptors of ours start here, out of the way of those that the program gets


@dataclass(frozen=True)
class Walls:
    """Which walls to build; fields as in `program.Isolation`."""

    namespaces: bool
    landlock: int
    seccomp: bool


@dataclass(frozen=True)
class Job:
    """One program to confine.

    paths: `root.runtime`. box: its work folder. files: path -> bytes. limits: `program.Limits` as
    a dict. descriptors: of the launcher, which the program gets as 0, 1, 2, ...
    """

    walls: Walls
    command: tuple[str, ...]
    paths: dict[str, str]
    box: str
    files: dict[str, bytes]
    limits: dict[str, int | float]
    descriptors: tuple[int, ...]


class _Failure(Exception):
    """A wall that could not be built."""

    def __init__(self, wall: str, error: OSError):
        super().__init__(f"{error.strerror or error}")
        self.wall = wall


def start(job: Job, report: int) -> int:
    """Fork the outer process. It and its children write to the pipe `report`; returns its pid."""
    launcher = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    report = _raised(report)
    try:
        _outer(job, report, launcher)
    except _Failure as failure:
        wire.send(report, ("error", failure.wall, str(failure)))
    except BaseException as error:
        wire.send(report, ("error", "", f"{type(error).__name__}: {error}"))
    finally:
        os._exit(1)


def _outer(job: Job, report: int, launcher: int) -> NoReturn:
    os.setsid()
    if job.walls.namespaces:
        _leave(job)
    elif os.geteuid() == 0:
        _become_user()
    os.chdir(job.box)
    _write(job.files)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user takes it away
    if os.getppid() != launcher:
        os._exit(1)
    wait, go = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(go)
        _first(job, report, wait)
    wire.send(report, ("started", pid))
    os.write(go, b"!")
    os.closerange(0, _HIGH)
    os.waitpid(pid, 0)
    os._exit(0)


def _leave(job: Job) -> None:
    """Enter new namespaces with a root of their own, as a user without rights outside."""
    disk = int(job.limits["disk_bytes"])
    process = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    try:
        if os.geteuid() == 0:  # the mounts come first: the interpreter may be in root's home
            linux.unshare(_NAMESPACES)
            root.enter(job.paths, disk, USER)
            _become_user()
            linux.unshare(linux.NEW_USER)
            _map(process, USER, USER)
        else:
            user, group = os.geteuid(), os.getegid()
            linux.unshare(linux.NEW_USER | _NAMESPACES)
            _map(process, user, group)
            root.enter(job.paths, disk, USER)
    except OSError as error:
        raise _Failure("namespaces", error) from None
    os.close(process)


def _become_user() -> None:
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root


def _map(process: int, user: int, group: int) -> None:
    """Say who the only user and group inside are outside."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{USER} {user} 1"),
        ("gid_map", f"{USER} {group} 1"),
    ):
        handle = os.open(name, os.O_WRONLY, dir_fd=process)
        os.write(handle, text.encode())
        os.close(handle)


def _write(files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if "/" in name:
            os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "wb") as file:
            file.write(data)


def _first(job: Job, report: int, wait: int) -> NoReturn:
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if not os.read(wait, 1):  # the outer process died before it could tell of this one
        os._exit(1)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    pid = os.fork()
    if not pid:
        _program(job, report)
    os.closerange(0, report)
    os.closerange(report + 1, report + 4096)
    ended = 0
    while ended != pid:
        ended, status, used = os.wait4(-1, 0)
    if not job.walls.namespaces:  # else all that is left dies with this process
        end_children()
    seconds = used.ru_utime + used.ru_stime
    wire.send(report, ("ended", status, seconds, used.ru_maxrss * 1024))
    os._exit(0)


def end_children(spare: Collection[int] = ()) -> None:
    """Kill this process's children, also those it inherits meanwhile, but for `spare`."""
    while left := set(children(os.getpid())).difference(spare):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def children(pid: int) -> list[int]:
    """The children of a process; empty for one that has gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def _program(job: Job, report: int) -> NoReturn:
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    sources = [_raised(source) for source in job.descriptors]
    for target, source in enumerate(sources):
        os.dup2(source, target)
    os.closerange(len(sources), report)
    os.closerange(report + 1, report + 4096)
    os.umask(0o077)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    _limit(job)
    _wall_in(job)
    environment = {
        **{"PATH": "/usr/bin:/bin", "HOME": job.box, "TMPDIR": job.box, "LANG": "C.UTF-8"},
        **{"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    }
    try:
        os.execve(job.command[0], job.command, environment)
    except OSError as error:
        hint = "" if job.walls.namespaces else f" as user {os.geteuid()}"
        message = f"{job.command[0]} cannot be run{hint}: {error.strerror}"
        raise _Failure("", OSError(error.errno, message)) from None


def _raised(descriptor: int) -> int:
    """A copy of a descriptor, out of the way of those that the program gets."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH)


def _limit(job: Job) -> None:
    limits = {name: int(value) for name, value in job.limits.items()}
    seconds = limits["cpu_seconds"]
    for kind, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        # The outer and the first process count too.
        (resource.RLIMIT_NPROC, limits["processes"] + 2, limits["processes"] + 2),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))


def _wall_in(job: Job) -> None:
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    if job.walls.landlock:
        try:
            rules = root.landlock_rules(job.paths, job.box, job.walls.landlock)
            landlock.restrict(rules, job.walls.landlock)
        except OSError as error:
            raise _Failure("landlock", error) from None
    if job.walls.seccomp:
        try:
            seccomp.install(seccomp.program())
        except OSError as error:
            raise _Failure("seccomp", error) from None
