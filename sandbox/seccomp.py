"""A filter of system calls: what no tested program needs and what namespaces do not cover.

The filter is a list of what is refused with "operation not permitted"; all else goes through.
Sockets are refused but for those of the Unix family: the network namespace has no network, but
sockets to a virtual machine's host (vsock) and to the kernel's ciphers belong to no namespace.
New namespaces are refused, since a namespace gives its maker rights over much kernel code. Shared
memory outside any process would escape the memory limit. The numbers are those of Linux's
`asm/unistd_64.h` (x86-64) and `asm-generic/unistd.h` (64-bit Arm).
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Mapping

from sandbox import linux

_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_CLONE3 = 435
_X32_BIT = 0x40000000
_UNIX_FAMILY = 1
_NEW_NAMESPACE = (linux.NEW_MOUNT | linux.NEW_CGROUP | linux.NEW_UTS | linux.NEW_IPC) | (
    linux.NEW_USER | linux.NEW_PID | linux.NEW_NET
)

# name: (x86-64, Arm)
REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "personality": (135, 92),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "syslog": (103, 116),
}

# Classic BPF: load a word, compare, return (linux/bpf_common.h, linux/seccomp.h).
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _error(number: int) -> bytes:
    return _instruction(_RETURN, _ERROR | number)


def program(
    refused: Mapping[str, tuple[int, int]] = REFUSED, machine: str = linux.MACHINE
) -> bytes:
    """The filter's instructions for a machine that is `known`."""
    column = tuple(_ARCHITECTURE).index(machine)
    allow = _instruction(_RETURN, _ALLOW)
    code = [
        _instruction(_LOAD, _MACHINE),
        _instruction(_EQUAL, _ARCHITECTURE[machine], yes=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _X32_BIT, no=1),
        _instruction(_RETURN, _KILL),
    ]
    for numbers in refused.values():
        code += [_instruction(_EQUAL, numbers[column], no=1), _error(errno.EPERM)]
    # The C library falls back to clone, whose flags a filter can read.
    code += [_instruction(_EQUAL, _CLONE3, no=1), _error(errno.ENOSYS)]
    code += [
        _instruction(_EQUAL, _SOCKET[machine], no=4),
        _instruction(_LOAD, _FIRST_ARGUMENT),
        _instruction(_EQUAL, _UNIX_FAMILY, no=1),
        allow,
        _error(errno.EPERM),
    ]
    code += [
        _instruction(_EQUAL, _CLONE[machine], no=3),
        _instruction(_LOAD, _FIRST_ARGUMENT),
        _instruction(_ANY_BIT, _NEW_NAMESPACE, no=1),
        _error(errno.EPERM),
        allow,
    ]
    return b"".join(code)


def known() -> bool:
    """Whether the numbers of this machine's system calls are known here."""
    return linux.MACHINE in _ARCHITECTURE


def install(instructions: bytes) -> None:
    """Put the filter on the calling process and its descendants, for good.

    Needs no-new-privileges to be set.
    """
    filter_ = _Program(len(instructions) // 8, instructions)
    linux.prctl(linux.PR_SET_SECCOMP, 2, filter_)
