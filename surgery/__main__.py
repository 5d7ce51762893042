"""`python -m surgery METHOD` makes a smaller checkpoint of a checkpoint, or one with adapters.

    python -m surgery rtn --checkpoint=A --out=B --bits=4 --group=128
    python -m surgery gptq --checkpoint=A --out=B --bits=3 --group=64 --data=text.jsonl.gz
    python -m surgery nf4 --checkpoint=A --out=B --evaluate=held_out.txt
    python -m surgery lora --checkpoint=B --out=C --rank=8
    python -m surgery export-adapter --checkpoint=C --out=adapter
    python -m surgery cast --checkpoint=runs/mine --out=assets/mine --dtype=bfloat16

A run that was stopped goes on where it was when the same command is given again. B holds the report
of each layer in quantization.jsonl, and in provenance.json what was done with which text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Run a method; the exit status is 0, or 2 for wrong input."""
    from model.checkpoint_folder import CheckpointError

    known, settings = _parse(arguments)
    try:
        if "run" in known:
            print(known.run(known))
        else:
            _run(known, settings)
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        print(f"python -m surgery: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[type, dict[str, Any]]]:
    """The plain arguments, and those of each dataclass of settings."""
    from sharding import MeshConfig
    from surgery.adapt.commands import COMMANDS
    from surgery.arguments import add_fields, plain_fields
    from surgery.checkpoint import Text
    from surgery.methods import METHODS
    from surgery.quantize.options import Options

    parser = argparse.ArgumentParser(
        prog="python -m surgery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for name, method in METHODS.items():
        title = (method.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=title, description=title, allow_abbrev=False)
        command.add_argument("--checkpoint", required=True, help="a checkpoint or run folder")
        command.add_argument("--out", required=True, help="the checkpoint folder to write")
        command.add_argument(
            "--dtype", default="float32", choices=("float32", "bfloat16"), help="of activations"
        )
        for cls, prefix in ((method, ""), (Text, ""), (Options, ""), (MeshConfig, "mesh.")):
            add_fields(command.add_argument_group(cls.__name__), cls, prefix)
    for name, simple in COMMANDS.items():
        command = commands.add_parser(name, help=simple.help, description=simple.help)
        command.add_argument("--checkpoint", required=True, help="a checkpoint or run folder")
        command.add_argument("--out", required=True, help="the folder to write")
        simple.arguments(command)
        command.set_defaults(run=simple.run)
    known = parser.parse_args(arguments)
    given = vars(known)
    if "run" in given:
        return known, {}
    settings = {
        cls: {
            field.name: given[prefix + field.name]
            for field in plain_fields(cls)
            if given[prefix + field.name] is not None
        }
        for cls, prefix in (
            (METHODS[known.method], ""),
            (Text, ""),
            (Options, ""),
            (MeshConfig, "mesh."),
        )
    }
    return known, settings


def _run(known: argparse.Namespace, settings: dict[type, dict[str, Any]]) -> None:
    import jax

    from model import Runtime
    from sharding import MeshConfig, make_layout, make_mesh
    from surgery.checkpoint import Text, quantize_checkpoint
    from surgery.methods import METHODS
    from surgery.quantize.options import Options

    mesh, layout = settings[MeshConfig], None
    if mesh or jax.device_count() > 1:
        layout = make_layout(make_mesh(MeshConfig(**mesh)))
    method = METHODS[known.method]
    with _progress(known.method) as progress:
        summary = quantize_checkpoint(
            known.checkpoint,
            known.out,
            known.method,
            method(**settings[method]),
            text=Text(**settings[Text]),
            options=Options(**settings[Options]),
            runtime=Runtime(compute_dtype=known.dtype, layout=layout),
            progress=progress,
        )
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in summary.items())
    print(f"{known.out}: {shown}")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the time left on a terminal, a line a layer elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("layer {task.completed}/{task.total}  {task.fields[note]}"),
    )
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None, note="")

        def show(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=note)
            if not console.is_terminal:
                console.print(f"{title}: layer {done}/{total}, {note}", markup=False)

        yield show


if __name__ == "__main__":
    sys.exit(main())
