"""Programs that try to get out of the sandbox or to use too much, with what must become of them.

Also a program of its own, for what must hold in another process: `ordinary` tries all of them as
user 65534 and prints how each ended; `without NAME` takes a system call away from this kernel and
prints what the sandbox says.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from sandbox import (
    Execution,
    Limits,
    Pool,
    Program,
    SandboxError,
    SandboxUnavailable,
    linux,
    seccomp,
)

ROOT = Path(__file__).parent.parent

LIMITS = Limits(wall_seconds=20.0, cpu_seconds=5, memory_bytes=256 * 2**20)
SHORT = replace(LIMITS, wall_seconds=1.0)

DENIED = """
import os, socket, sys
def denied(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    print("went through:", action.__code__.co_firstlineno)
    sys.exit(3)
"""
NO_CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(name, *arguments):
    if getattr(libc, name)(*arguments) != -1:
        print("went through:", name)
        os._exit(3)
"""

DAEMON = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(60)
    os._exit(0)
"""

# name: (source, limits, expected status); a program that is denied all it tries ends with "ok"
ESCAPES: dict[str, tuple[str, Limits, str]] = {
    "reads the machine's files": (
        DENIED
        + f"""
for path in ("/etc/passwd", "/etc/shadow", {str(ROOT / "pyproject.toml")!r}, {__file__!r},
             "/var/log", "/sys/kernel", "/boot", "/.old", "/dev/mem", "/dev/kmsg", "/dev/vda"):
    denied(lambda: os.open(path, os.O_RDONLY))
denied(lambda: os.listdir("/home"))
denied(lambda: os.listdir("/"))
assert os.listdir() == ["main.py"]
""",
        LIMITS,
        "ok",
    ),
    "writes outside its folder": (
        DENIED
        + """
for folder in ("/", "/usr", "/lib", "/usr/local", "/var/tmp", "/dev/shm", "/run", sys.prefix):
    denied(lambda: os.open(folder + "/planted", os.O_CREAT | os.O_WRONLY))
    denied(lambda: os.mkdir(folder + "/planted"))
denied(lambda: os.unlink(sys.executable))
denied(lambda: os.chmod(sys.prefix, 0o777))
open("inside", "w").write("this is allowed")
""",
        LIMITS,
        "ok",
    ),
    "goes over links and parents": (
        DENIED
        + """
for number, target in enumerate(("/etc/passwd", "../etc/passwd", "/proc/1/root/etc/passwd", "/")):
    os.symlink(target, f"link{number}")
denied(lambda: open("link0")), denied(lambda: open("link1")), denied(lambda: open("link2"))
denied(lambda: os.listdir("link3"))
denied(lambda: open("../" * 20 + "etc/passwd"))
denied(lambda: os.link(sys.executable, "hard"))
denied(lambda: os.chroot("."))
denied(lambda: os.mknod("disk", 0o60600, os.makedev(8, 0)))
""",
        LIMITS,
        "ok",
    ),
    "asks /proc": (
        DENIED
        + """
for path in ("/proc", "/proc/self/environ", "/proc/self/mem", "/proc/1/mem", "/proc/self/root",
             "/proc/sys/kernel/core_pattern", "/proc/self/fd"):
    denied(lambda: os.stat(path))
""",
        LIMITS,
        "ok",
    ),
    "uses the network": (
        DENIED
        + """
vsock, alg, netlink, packet = 40, 38, 16, 17
for family in (socket.AF_INET, socket.AF_INET6, vsock, alg, netlink, packet):
    denied(lambda: socket.socket(family, socket.SOCK_STREAM))
    denied(lambda: socket.socket(family, socket.SOCK_DGRAM))
def loopback():
    socket.create_connection(("127.0.0.1", 22), timeout=2)
denied(loopback)
unix = socket.socket(socket.AF_UNIX)
denied(lambda: unix.connect("/run/docker.sock"))
""",
        LIMITS,
        "ok",
    ),
    "turns on its parents": (
        NO_CALL
        + """
import signal
for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
    try:
        os.kill(os.getppid(), number)
    except PermissionError:
        pass
    try:
        os.kill(-1, number)
    except (PermissionError, ProcessLookupError):
        pass
assert os.getppid() == 1
attach, parent = 16, 1
refused("ptrace", attach, parent, None, None)
refused("process_vm_readv", parent, None, 0, None, 0, 0)
""",
        LIMITS,
        "ok",
    ),
    "asks the kernel for more": (
        NO_CALL
        + """
new_user, new_mount, everything = 0x10000000, 0x20000, 0x7E020000
refused("unshare", new_user)
refused("unshare", everything)
refused("setns", 0, 0)
refused("mount", b"none", b"/box", b"tmpfs", 0, None)
refused("umount2", b"/box", 2)
refused("memfd_create", b"hoard", 0)
refused("shmget", 0, 1 << 30, 0o1600)
refused("syscall", 435, None, 0)
for set_id in (os.setuid, os.setgid):
    try:
        set_id(0)
    except OSError:
        continue
    os._exit(3)
assert os.getuid() == os.geteuid() == 65534
""",
        LIMITS,
        "ok",
    ),
    "finds descriptors and secrets": (
        """
import os
for number in range(3, 4096):
    try:
        os.fstat(number)
    except OSError:
        continue
    print("open:", number)
    os._exit(3)
assert "SECRET_OF_THE_PARENT" not in os.environ
""",
        LIMITS,
        "ok",
    ),
    "counts how far it can fork": (
        """
import os, time
children = 0
while children < 64:
    try:
        if not os.fork():
            time.sleep(60)
            os._exit(0)
    except OSError:
        break
    children += 1
print(children)
""",
        LIMITS,
        "ok",
    ),
    "is a fork bomb": (
        """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        SHORT,
        "timeout",
    ),
    "leaves a daemon behind": (DAEMON, LIMITS, "ok"),
    "allocates too much": ("bytearray(2 << 30)", LIMITS, "memory"),
    "allocates too much in many processes": (
        """
import os, time
for _ in range(6):
    if not os.fork():
        data = bytearray(b"x") * (100 << 20)
        time.sleep(60)
        os._exit(0)
time.sleep(60)
""",
        LIMITS,
        "memory",
    ),
    "floods its output": ("while True: print('x' * 1000)", LIMITS, "output"),
    "floods its errors": (
        "import sys\nwhile True: print('x' * 1000, file=sys.stderr)",
        LIMITS,
        "output",
    ),
    "writes a huge file": (
        DENIED
        + """
file = open("huge", "wb", buffering=0)
def fill():
    while True:
        file.write(bytes(1 << 20))
denied(fill)
assert os.path.getsize("huge") <= 8 << 20
def many():
    for number in range(100):
        open(f"part{number}", "wb").write(bytes(4 << 20))
denied(many)
""",
        LIMITS,
        "ok",
    ),
    "never ends": ("while True: pass", replace(LIMITS, cpu_seconds=1), "timeout"),
    "sleeps": ("import time; time.sleep(60)", SHORT, "timeout"),
    "ignores signals": (
        "import signal, time\n"
        "for number in (15, 2, 1, 24): signal.signal(number, signal.SIG_IGN)\n"
        "while True: pass",
        SHORT,
        "timeout",
    ),
    "crashes": ("import ctypes; ctypes.string_at(8)", LIMITS, "killed"),
}


def pool_or_skip(workers: int = 1) -> Pool:
    """A pool; on a machine that cannot isolate, see that it is refused with reasons, and skip."""
    import pytest

    try:
        return Pool(workers)
    except SandboxUnavailable as error:
        refusal = str(error)
    assert refusal.startswith("untrusted programs cannot be isolated on this machine: ")
    return pytest.skip(refusal)


def attempt(pool: Pool, name: str) -> Execution:
    """Run one of `ESCAPES`; its processes carry its name in their command lines."""
    source, limits, _ = ESCAPES[name]
    return pool.run(Program(source, arguments=(marker(name),)), limits)


def marker(name: str) -> str:
    """What the command lines of a program's processes hold, and no other's."""
    return f"sandbox-test-{os.getpid()}-{name}"


def left_over(text: str) -> list[int]:
    """The processes whose command line has `text`."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and text.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def reachable(path: str) -> None:
    """Let any user of this mount namespace reach a folder that lies in a closed one."""
    parents = [str(parent) for parent in reversed(Path(path).parents)]
    closed = [parent for parent in parents if not os.stat(parent).st_mode & 1]
    if not closed:
        return
    handle = os.open(path, os.O_PATH | os.O_DIRECTORY)
    linux.mount("tmpfs", closed[0], "tmpfs", 0, "mode=755")
    os.makedirs(path)
    linux.mount(f"/proc/self/fd/{handle}", path, None, linux.MS_BIND | linux.MS_REC)


def become_ordinary() -> None:
    """Root becomes user 65534, who can still run this Python and read this checkout."""
    if os.geteuid() == 0:
        linux.unshare(linux.NEW_MOUNT)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        for path in (sys.base_prefix, str(ROOT)):
            reachable(os.path.realpath(path))
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        linux.prctl(linux.PR_SET_DUMPABLE, 1)


def all_as_ordinary_user() -> dict[str, list[str]]:
    with Pool(workers=2) as pool:
        names = list(ESCAPES)
        results = pool.map(lambda name: attempt(pool, name), names)
    return {
        name: [run.status, run.stdout[:200], run.detail]
        for name, run in zip(names, results, strict=True)
    }


def without(call: str) -> dict[str, object]:
    """What a pool says where the kernel refuses one of the system calls that it needs."""
    calls = {"unshare": (272, 97), "landlock_create_ruleset": (444, 444)}
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(seccomp.program({call: calls[call]}))
    refusal = ""
    try:
        Pool().close()
    except SandboxError as error:
        refusal = str(error)
    with Pool(allow_weaker=True) as pool:
        source = f"import os; print(os.getcwd()); open({str(ROOT / 'README.md')!r})"
        run = pool.run(Program(source))
        name = marker("without")
        never = pool.run(Program(DAEMON + "time.sleep(60)", arguments=(name,)), SHORT)
        daemon = pool.run(Program(DAEMON, arguments=(name,)), LIMITS)
    return {
        "refusal": refusal,
        "folder": run.stdout.strip(),
        "detail": run.detail,
        "ends": [never.status, daemon.status],
        "left_over": len(left_over(name)),
        "missing": "; ".join(run.isolation.missing),
    }


if __name__ == "__main__":
    try:
        become_ordinary()
    except OSError as error:
        print(json.dumps({"skip": f"root cannot become another user here: {error}"}))
    else:
        result = all_as_ordinary_user() if sys.argv[1] == "ordinary" else without(sys.argv[2])
        print(json.dumps(result))
