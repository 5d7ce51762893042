"""Landlock: which files a process and its descendants may touch, whatever its user (Linux 5.13).

It stands behind the mount namespace: a program that found a path out of its root would still be
refused there. Where the kernel can, it also forbids TCP and signals to processes outside.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from sandbox import linux

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_VERSION_FLAG = 1
_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
_ALL_OF_ABI_1 = (1 << 13) - 1
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15  # since ABI 2, 3, 5
_TCP = 0b11  # bind and connect, since ABI 4
_SCOPES = 0b11  # abstract sockets and signals, since ABI 6

READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
DEVICE = READ_FILE | WRITE_FILE | _IOCTL_DEVICE
_OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | _TRUNCATE | _IOCTL_DEVICE


def version() -> int:
    """The ABI that the kernel offers, 0 for none."""
    try:
        return linux.syscall("landlock_create_ruleset", _CREATE, None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def everything(abi: int) -> int:
    """All rights over files that this ABI knows."""
    rights = _ALL_OF_ABI_1
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEVICE)):
        rights |= right if abi >= since else 0
    return rights


def restrict(rules: Iterable[tuple[str, int]], abi: int) -> None:
    """Confine the calling process, for good, to the paths of `rules`: `(path, rights)`.

    Needs no-new-privileges to be set. Paths that do not exist are left out, which only takes away.
    """
    handled = everything(abi)
    attributes = [handled, _TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0]
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = linux.syscall(
        "landlock_create_ruleset", _CREATE, (ctypes.c_uint64 * 3)(*attributes), size, 0
    )
    for path, rights in rules:
        if os.path.exists(path):
            _allow(ruleset, path, rights & handled)
    linux.syscall("landlock_restrict_self", _RESTRICT, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    handle = os.open(path, os.O_PATH)
    if not os.path.isdir(path):
        rights &= _OF_A_FILE
    rule = rights.to_bytes(8, "little") + handle.to_bytes(4, "little")
    linux.syscall("landlock_add_rule", _ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    os.close(handle)
