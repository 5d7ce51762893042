"""What is run, within which limits, behind which walls, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

MIB = 2**20

Status = Literal["ok", "failed", "timeout", "memory", "output", "killed", "stopped"]
"""How a program ended: exit code 0; another exit code; over its wall or CPU time; over its memory;
over its output; by a signal; by the sandbox, after the answer it was needed for had come."""


class SandboxError(RuntimeError):
    """The sandbox itself went wrong: nothing is known about the program."""


class SandboxUnavailable(SandboxError):
    """This machine cannot isolate a program. The message says what is missing."""


@dataclass(frozen=True)
class Limits:
    """What one program may use; all are enforced from outside the program.

    wall_seconds: from start to end. cpu_seconds: of each process, whole seconds.
    memory_bytes: of address space for each process, and of resident memory for all together.
    output_bytes: on standard output and on standard error, each.
    file_bytes: of one file. disk_bytes: of the work folder.
    processes: processes and threads together. open_files: descriptors of each process.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 512 * MIB
    output_bytes: int = 100_000
    file_bytes: int = 8 * MIB
    disk_bytes: int = 32 * MIB
    processes: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            whole = item.name != "wall_seconds"
            if value <= 0 or (whole and not isinstance(value, int)):
                kind = "a whole number of 1 or more" if whole else "a number above 0"
                raise ValueError(f"Limits.{item.name} is {value!r}; it must be {kind}")


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Program:
    """A Python program: `source` is run as `main.py` in an empty folder that also has `files`.

    files: relative path -> text or bytes. arguments: of the command line.
    stdin: what standard input holds. packages: whether the packages installed for the running
    interpreter can be imported (NumPy); their folder is then readable, and start-up is slower.
    """

    source: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    stdin: str | bytes = b""
    packages: bool = False

    def __post_init__(self) -> None:
        for name in self.files:
            parts = name.split("/")
            if not name or "\0" in name or {"", ".", ".."} & set(parts):
                raise ValueError(
                    f"Program.files has {name!r}; a file's name is a path below the work folder,"
                    " without '.', '..' or a leading '/'"
                )
        if "main.py" in self.files:
            raise ValueError("Program.files has 'main.py', which is the name that `source` gets")


@dataclass(frozen=True)
class Isolation:
    """The walls around a program.

    namespaces: own users, processes, mounts, network, host name and IPC. landlock: the kernel's
    ABI, 0 for none. seccomp: a filter of system calls. missing: a line for each wall that could
    not be built, and for what a probe could reach through the gap.
    A program is never root outside, and its resources are limited, whatever else is missing.
    """

    namespaces: bool
    landlock: int
    seccomp: bool
    missing: tuple[str, ...] = ()

    @property
    def full(self) -> bool:
        """Whether every wall stands."""
        return not self.missing


@dataclass(frozen=True)
class Execution:
    """How a program ended.

    exit_code: None if a signal ended it. signal: the signal's name, or "". seconds: wall time.
    cpu_seconds, peak_bytes: of the first process and those it waited for.
    stdout, stderr: cut at the limit; bytes that are not UTF-8 become U+FFFD.
    detail: which limit was hit. isolation: what stood between the program and the machine.
    """

    status: Status
    exit_code: int | None
    signal: str
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    detail: str
    isolation: Isolation

    @property
    def ok(self) -> bool:
        """Whether the program ended by itself with exit code 0."""
        return self.status == "ok"
