"""`python -m serving bench` puts load on a server and times it; `serve.py` is the server."""

from __future__ import annotations

import sys

from serving.load.command_line import parse


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is the command's."""
    known = parse(arguments)
    return known.run(known)


if __name__ == "__main__":
    sys.exit(main())
