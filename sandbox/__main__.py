"""`python -m sandbox check` says what this machine isolates; `run FILE` runs a program."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sandbox.pool import Pool, run
from sandbox.program import Limits, Program, SandboxError


def _check() -> int:
    with Pool(allow_weaker=True) as pool:
        walls = pool.isolation
        execution = pool.run(Program("print('hello')"))
    landlock = f"yes (ABI {walls.landlock})" if walls.landlock else "no"
    print(f"namespaces  {'yes' if walls.namespaces else 'no'}")
    print(f"landlock    {landlock}")
    print(f"seccomp     {'yes' if walls.seccomp else 'no'}")
    print(f"one run     {execution.seconds * 1e3:.0f} ms, {execution.cpu_seconds * 1e3:.0f} ms CPU")
    for line in walls.missing:
        print(f"missing     {line}")
    print("Untrusted programs are " + ("isolated." if walls.full else "refused on this machine."))
    return 0 if walls.full else 1


def _run(options: argparse.Namespace) -> int:
    program = Program(
        Path(options.file).read_text(encoding="utf-8"),
        arguments=tuple(options.arguments),
        stdin=b"" if sys.stdin.isatty() else sys.stdin.buffer.read(),
        packages=options.packages,
    )
    limits = Limits(
        wall_seconds=options.seconds,
        cpu_seconds=max(1, round(options.seconds)),
        memory_bytes=options.megabytes * 2**20,
    )
    result = run(program, limits, allow_weaker=options.allow_weaker)
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    if not result.ok:
        print(f"{result.status}: {result.detail}", file=sys.stderr)
    return 0 if result.ok else 1


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 if all is well."""
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="say what this machine can isolate")
    runs = commands.add_parser("run", help="run a Python file in the sandbox")
    runs.add_argument("file")
    runs.add_argument("arguments", nargs="*", help="of the program's command line")
    runs.add_argument("--seconds", type=float, default=10.0, help="of wall time, and of CPU time")
    runs.add_argument("--megabytes", type=int, default=512, help="of memory")
    runs.add_argument("--packages", action="store_true", help="allow installed packages")
    runs.add_argument("--allow-weaker", action="store_true", help="run where a wall is missing")
    options = parser.parse_args(arguments)
    try:
        return _check() if options.command == "check" else _run(options)
    except (OSError, ValueError, SandboxError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
