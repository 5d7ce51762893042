"""Train a model: `python train.py --config=configs/quickstart.py`.

The same command runs on one CPU, on the devices of one host, and on every host of a pod. It resumes
the run that stands in its folder, saves when it is interrupted, and says how to go on.
`--help` lists every field of the config.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sheaf"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 2 wrong input, 3 stopped early)."""
    keep_freed_memory()
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


def keep_freed_memory() -> bool:
    """Let freed blocks below 2 GiB be used again instead of going back to the system.

    XLA frees the scratch space of a step after each; glibc returns blocks that large at once, and
    fetching them again as zeroed pages takes a fifth of a small model's step on a CPU. In a program
    of your own call it first, before the first import that starts threads (NumPy's does), or it has
    no effect. The process then keeps its peak memory. Returns False where the C library is another.
    """
    trim_threshold, mmap_threshold, arena_max, largest = -1, -3, -8, 2**31 - 1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Arenas other than the main one map every large block afresh, whatever the threshold.
    settings = ((arena_max, 1), (mmap_threshold, largest), (trim_threshold, largest))
    return sum(mallopt(name, value) for name, value in settings) == len(settings)


def _run(command) -> int:
    import jax

    from model.checkpoint_folder import CheckpointError
    from sharding import initialize_distributed
    from training.command_line import default_workdir
    from training.errors import RunError
    from training.language_model import dry_data, train_language_model
    from training.replay import replay

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "compiled"))
    try:
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
        return train_language_model(command.config, workdir).exit_status
    except (RunError, CheckpointError, ValueError, OSError) as error:
        if os.environ.get("SHEAF_TRACEBACK"):
            raise
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
