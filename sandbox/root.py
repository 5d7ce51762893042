"""A root folder of its own: the Python runtime read-only, a work folder, and nothing else.

No /proc, no /sys, no home, and no path that leads out: the old root is unmounted. The work folder
is a file system in memory with a fixed size, so it bounds the disk and leaves nothing behind.
"""

from __future__ import annotations

import os
import sys

from sandbox import landlock, linux

BOX = "/box"
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")
_BASE, _OLD = "/tmp", "/.old"


def interpreter(packages: bool) -> str:
    """The running Python's file: of its environment with packages, else the base installation's."""
    return sys.executable if packages else os.path.realpath(sys.executable)


def runtime(packages: bool) -> dict[str, str]:
    """`path -> the same with links resolved` of all without which this Python does not start."""
    wanted = [*_SYSTEM, sys.base_prefix, sys.base_exec_prefix]
    wanted += [os.path.dirname(os.path.dirname(interpreter(False)))]
    if packages:
        wanted += [sys.prefix, *(path for path in sys.path if path.endswith("-packages"))]
    kept: dict[str, str] = {}
    for path in wanted:
        inside = any(path == other or path.startswith(other + "/") for other in kept)
        if os.path.exists(path) and path != "/" and not inside:
            kept[path] = os.path.realpath(path)
    return kept


def landlock_rules(paths: dict[str, str], box: str, abi: int) -> list[tuple[str, int]]:
    """`(path, rights)` of what a program may touch."""
    rules = [(path, landlock.RUN) for path in paths]
    rules += [(path, landlock.DEVICE) for path in DEVICES]
    return [*rules, (box, landlock.everything(abi))]


def enter(paths: dict[str, str], disk_bytes: int, owner: int) -> None:
    """Change into the new root, with mounts that only this namespace sees.

    The work folder belongs to `owner`. Needs a mount namespace of its own and the rights over it.
    """
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    flags = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("tmpfs", _BASE, "tmpfs", flags, "size=1m,mode=755")
    os.mkdir(_BASE + _OLD)
    linux.pivot_root(_BASE, _BASE + _OLD)
    os.chdir("/")
    for path, source in paths.items():
        _bring(source, path, linux.MS_RDONLY | flags)
    for path in DEVICES:
        _bring(path, path, linux.MS_NOSUID)
    os.mkdir(BOX)
    options = f"size={disk_bytes},nr_inodes=4096,mode=700,uid={owner},gid={owner}"
    linux.mount("tmpfs", BOX, "tmpfs", flags, options)
    if not os.path.lexists("/tmp"):
        os.symlink(BOX, "/tmp")
    linux.unmount(_OLD)
    os.rmdir(_OLD)
    linux.set_mount_flags("/", linux.MS_RDONLY, below=False)


def _bring(source: str, path: str, flags: int) -> None:
    """Make a file or folder of the old root visible at `path`."""
    source = _OLD + source
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    linux.mount(source, path, None, linux.MS_BIND | linux.MS_REC)
    linux.set_mount_flags(path, flags)
