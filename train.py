"""Train a model: `python train.py --config=configs/quickstart.py`.

The same command runs on one CPU, on the devices of one host, and on every host of a pod. It resumes
the run that stands in its folder, saves when it is interrupted, and says how to go on.
`--help` lists every field of the config.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sheaf"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 2 wrong input, 3 stopped early)."""
    from training.command_line import parse
    from training.config import ConfigError

    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    if command.help_text:
        print(command.help_text)
        return 0
    return _run(command)


def ask_for_huge_pages() -> None:
    """Start the program anew, in place, with glibc's `malloc` asking the system for huge pages.

    XLA takes the scratch space of each step from the system and gives it back. On a CPU, fetching
    it in pages of 4 KiB is a fifth of a small model's step. Only the environment can ask for larger
    ones. Does nothing where it is asked for already, where the C library is another, and where
    JAX_PLATFORMS says that the arrays are not in host memory.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    other_platform = "cpu" not in os.environ.get("JAX_PLATFORMS", "cpu")
    if "glibc.malloc.hugetlb" in tunables or platform.libc_ver()[0] != "glibc" or other_platform:
        return
    tunables = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
    sys.stdout.flush()
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, {**os.environ, "GLIBC_TUNABLES": tunables})


def give_threads_to_devices() -> None:
    """Let XLA have a thread for each of many CPU devices; call it before JAX is imported.

    Its collectives wait inside its thread pool, so a pool of as many threads as there are cores
    deadlocks where `XLA_FLAGS` asks for more devices. `NPROC` is the variable that XLA reads.
    """
    asked = re.search(
        r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    if asked and int(asked[1]) > 1:
        os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, 4 * int(asked[1]))))


def _run(command) -> int:
    import jax

    from model.checkpoint_folder import CheckpointError
    from sharding import initialize_distributed
    from training.command_line import default_workdir
    from training.errors import RunError
    from training.heartbeat import Heartbeat
    from training.language_model import dry_data, train_language_model
    from training.replay import replay

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "compiled"))
    heartbeat = Heartbeat.from_environment(command.get("process-id"))
    try:
        with heartbeat:
            initialize_distributed(
                command.get("coordinator"), command.get("num-processes"), command.get("process-id")
            )
            if "replay" in command.flags:
                return replay(
                    Path(command.get("replay")), command.get("to-step"), command.get("workdir")
                )
            workdir = Path(command.get("workdir") or default_workdir(command.config))
            if command.get("dry-data"):
                return dry_data(command.config, workdir)
            return train_language_model(command.config, workdir, heartbeat=heartbeat).exit_status
    except (RunError, CheckpointError, ValueError, OSError) as error:
        if os.environ.get("SHEAF_TRACEBACK"):
            raise
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    ask_for_huge_pages()
    give_threads_to_devices()
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
