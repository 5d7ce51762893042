"""`python -m training`: what stands around a run on a cluster. `train.py` is the run itself.

    python -m training supervise --hosts=a,b,c --sizes=2 -- train.py --config=configs/quickstart.py
    python -m training health
    python -m training timeline runs/quickstart

`supervise` keeps a run going over failing hosts; what stands after `--` is the run's own command.
Its exit status is that of the run, or 1 if it gave up. `health` checks devices and links (of all
processes, started as those of a run are); its exit status is 1 if one has a problem. `timeline`
shows what each process did when, and who held the others up.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 2 for wrong input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags, script = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        flags, script = arguments[:cut], arguments[cut + 1 :]
    known = _parser().parse_args(flags)
    try:
        if script and known.run is not supervise:
            raise ValueError("only supervise takes a command after --")
        return known.run(known, script) if known.run is supervise else known.run(known)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("SHEAF_TRACEBACK"):
            raise
        print(f"python -m training: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, title: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=title, description=title, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    _supervise_flags(command("supervise", supervise, "start a run's workers and keep them going"))
    _health_flags(command("health", health, "check every device and link"))
    shown = command("timeline", timeline, "what each process of a run did, and who was slow")
    shown.add_argument("folder", help="a run's folder")
    shown.add_argument("--out", help="where to write (default: RUN/timeline)")
    return parser


def _supervise_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hosts", required=True, help="names, separated by commas, in the order of processes")
    add(
        "--sizes",
        default="",
        help="numbers of hosts that the mesh takes, best first (default: all)",
    )
    add("--launcher", default="local", help="local, srun, ssh, or a prefix that says {host}")
    add("--health", choices=("always", "failure", "never"), default="always")
    add("--health-flags", default="", help="flags of the health check, in one word")
    add("--check-links", action="store_true", help="and the links between the hosts")
    add("--health-seconds", type=float, default=120.0, help="longest time of the check of hosts")
    add("--heartbeat-seconds", type=float, default=1.0)
    add("--timeout-seconds", type=float, default=30.0, help="without a heartbeat: a hang")
    add("--max-restarts", type=int, default=5, help="in a row without a new checkpoint")
    add("--backoff-seconds", type=float, default=1.0, help="before the first of such restarts")
    add("--port", type=int, default=8476, help="of the coordinator; attempts take the next of ten")


def _health_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", help="also write the results to this file")
    add("--tolerance", type=float, help="share below the median that is slow (default: 0.1)")
    add("--limit-seconds", type=float, default=60.0, help="longest time of one check")
    for name in ("matmul-size", "matmul-repeats", "memory-bytes", "transfer-bytes"):
        add(f"--{name}", type=int)
    add("--exchange-bytes", type=int)
    add("--coordinator", help="address of process 0, host:port (else from the environment)")
    add("--num-processes", type=int)
    add("--process-id", type=int)


def supervise(known: argparse.Namespace, script: list[str]) -> int:
    """Supervise the command that stands after `--`."""
    from training.command_line import default_workdir, parse
    from training.launchers import make_launcher
    from training.supervisor import Supervisor
    from training.supervisor_config import SupervisorConfig

    if not script or not script[0].endswith(".py"):
        raise ValueError("supervise needs the run's own command: … -- train.py --config=FILE")
    for taken in ("--coordinator", "--num-processes", "--process-id", "--replay"):
        if any(word.partition("=")[0] == taken for word in script):
            raise ValueError(f"{taken} is no flag of a supervised run")
    command = parse(script[1:])
    if command.config is None:
        raise ValueError(f"{' '.join(script)} trains nothing")
    workdir = Path(command.get("workdir") or default_workdir(command.config))
    config = SupervisorConfig(
        hosts=tuple(filter(None, known.hosts.split(","))),
        sizes=_numbers("--sizes", known.sizes),
        launcher=make_launcher(known.launcher),
        health=None if known.health == "never" else tuple(known.health_flags.split()),
        check_first=known.health == "always",
        links=known.check_links,
        health_seconds=known.health_seconds,
        heartbeat_seconds=known.heartbeat_seconds,
        timeout_seconds=known.timeout_seconds,
        max_restarts=known.max_restarts,
        backoff_seconds=known.backoff_seconds,
        port=known.port,
    )
    supervisor = Supervisor(config, script, workdir)
    stop = lambda number, _: supervisor.stop(signal.Signals(number).name)  # noqa: E731
    before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        return supervisor.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"{flag}={text}: expected whole numbers, such as 16,8")
    return tuple(map(int, parts))


def health(known: argparse.Namespace) -> int:
    """Check this process's devices, and their links with those of the other processes."""
    from sharding import initialize_distributed
    from training.health_run import run

    initialize_distributed(known.coordinator, known.num_processes, known.process_id)
    names = ("matmul_size", "matmul_repeats", "memory_bytes", "transfer_bytes", "exchange_bytes")
    given = {name: getattr(known, name) for name in names if getattr(known, name) is not None}
    return run(given, known.tolerance, known.json, known.limit_seconds)


def timeline(known: argparse.Namespace) -> int:
    """Show a run's timeline."""
    from training.timeline_report import show

    print(show(Path(known.folder), Path(known.out) if known.out else None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
