"""Train a model: `python train.py --config=configs/quickstart.py`.

The same command runs on one CPU, on the devices of one host, and on every host of a pod. It resumes
the run that stands in its folder, saves when it is interrupted, and says how to go on.
`--help` lists every field of the config.
"""

from __future__ import annotations

import os
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
        print(f"train.py: {error}\n(SHEAF_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
