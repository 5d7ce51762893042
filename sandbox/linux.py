"""The calls of the Linux kernel that isolation is made of, through `ctypes`.

Each function here is one system call with its error turned into an `OSError` that names the call.
[landlock.py](landlock.py) and [seccomp.py](seccomp.py) hold the two that need more than a line.
"""

from __future__ import annotations

import ctypes
import os
import platform

MACHINE = platform.machine()

NEW_MOUNT, NEW_UTS, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
NEW_CGROUP = 0x02000000

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER = 22, 36

_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

_libc = ctypes.CDLL(None, use_errno=True)


def checked(name: str, result: int) -> int:
    """A system call's result; `OSError` with the call's name where it is -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(name: str, number: int, *arguments: int | bytes | ctypes.Array | None) -> int:
    """A system call by number. Integers are passed as 64 bits."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return checked(name, _libc.syscall(ctypes.c_long(number), *wide))


def unshare(flags: int) -> None:
    """Leave the shared namespaces named by `flags` for new ones."""
    checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def prctl(option: int, value: int, third: int | ctypes.Structure = 0) -> None:
    """One setting of the calling process."""
    last = ctypes.byref(third) if isinstance(third, ctypes.Structure) else ctypes.c_ulong(third)
    zero = ctypes.c_ulong(0)
    checked("prctl", _libc.prctl(option, ctypes.c_ulong(value), last, zero, zero))


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount `source` at `target`."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    options = None if data is None else data.encode()
    checked(f"mount {target}", _libc.mount(*encoded, ctypes.c_ulong(flags), options))


def unmount(target: str) -> None:
    """Take a mount out of the tree at once; what is still open in it stays usable."""
    checked(f"umount {target}", _libc.umount2(target.encode(), MNT_DETACH))


def set_mount_flags(target: str, flags: int, below: bool = True) -> None:
    """Add read-only, no-suid or no-dev to a mount, and to all below it (Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)  # set, clear, propagation, user namespace
    syscall(
        f"mount_setattr {target}",
        *(_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE if below else 0),
        *(attributes, ctypes.sizeof(attributes)),
    )


def pivot_root(new: str, old: str) -> None:
    """Make the mount at `new` the root of this mount namespace, and hang the old root at `old`."""
    syscall("pivot_root", _PIVOT_ROOT[MACHINE], new.encode(), old.encode())
