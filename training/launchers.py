"""How a command gets onto a host: a prefix, and nothing else.

A supervisor has one local child for each worker: the command itself, or the `srun` or `ssh` that
runs it elsewhere. Starting, waiting and reading output are then the same everywhere. What a remote
worker must be told while it runs goes through files of the shared run folder, since signals to
`ssh` do not reach what it has started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from weights import nearest

PORTS = 10
"""Ports that attempts take in turn, for one that was just used may still be held."""


@dataclasses.dataclass(frozen=True)
class Launcher:
    """A way to hosts.

    prefix: words before a command; `{host}` in them stands for the host. Empty: this machine.
    shell: the command is one word that a shell on the host reads, as `ssh` wants it.
    """

    prefix: tuple[str, ...] = ()
    shell: bool = False

    @property
    def local(self) -> bool:
        """Whether all hosts are this machine under other names."""
        return not any("{host}" in word for word in self.prefix)

    def command(self, host: str, argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        """The local command that runs `argv` on a host, in this directory, with more environment.

        JAX would give a process of a Slurm step one GPU, the one of its number on the host;
        `SLURM_LOCALID` is taken away, so that a worker has all of them.
        """
        settings = [f"{name}={value}" for name, value in environment.items()]
        whole = ["env", "-u", "SLURM_LOCALID", *settings, *argv]
        if self.shell:
            whole = [f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(whole)}"]
        return [*(word.replace("{host}", host) for word in self.prefix), *whole]

    def start(
        self, host: str, argv: Sequence[str], environment: Mapping[str, str], output: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host, in a process group of its own; all it says goes to a file."""
        with open(output, "wb") as file:
            return subprocess.Popen(
                self.command(host, argv, environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


LAUNCHERS: dict[str, Launcher] = {
    "local": Launcher(),
    "srun": Launcher(
        ("srun", "--nodes=1", "--ntasks=1", "--overlap", "--nodelist={host}", "--unbuffered")
    ),
    "ssh": Launcher(("ssh", "-tt", "-o", "BatchMode=yes", "{host}"), shell=True),
}
"""Launchers by name; any other is given as its prefix, such as `kubectl exec {host} --`."""


def make_launcher(text: str) -> Launcher:
    """A launcher by name or prefix; `ValueError` for a word that is neither."""
    if text in LAUNCHERS:
        return LAUNCHERS[text]
    if "{host}" not in text:
        raise ValueError(
            f"--launcher={text}: no such launcher (nearest: {nearest(text, LAUNCHERS)}), and no "
            "prefix of a command either, for it does not say {host}"
        )
    return Launcher(tuple(shlex.split(text)))


def kill(process: subprocess.Popen[bytes], grace: float = 1.0) -> None:
    """End a command and all that it has started here, stopped processes too.

    SIGTERM comes first: `srun` hands it on, while its own sudden death would leave the step behind.
    """
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def python() -> str:
    """The interpreter of workers: that of the supervisor."""
    return sys.executable


def joining(launcher: Launcher, hosts: Sequence[str], number: int, port: int) -> list[str]:
    """The flags by which process `number`, one on each host, finds the others; none if alone."""
    if len(hosts) == 1:
        return []
    address = "127.0.0.1" if launcher.local else hosts[0]
    return [
        f"--coordinator={address}:{port}",
        f"--num-processes={len(hosts)}",
        f"--process-id={number}",
    ]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
