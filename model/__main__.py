"""`python -m model import` reads a Hugging Face checkpoint, `export` writes one, `check` looks at
one without reading its weights.

    python -m model import --from=HF_FOLDER --to=CHECKPOINT --dtype=bfloat16 --mesh.fsdp=4
    python -m model export --checkpoint=runs/mine --to=HF_FOLDER
    python -m model check HF_FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sharding.mesh import MeshConfig

DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("gptq", "awq", "bitsandbytes")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _import_arguments(commands.add_parser("import", help="Hugging Face to Sheaf"))
    _export_arguments(commands.add_parser("export", help="Sheaf to Hugging Face"))
    check = commands.add_parser("check", help="what a Hugging Face folder holds, from its headers")
    check.add_argument("source", help="a folder, or hub:owner/name[@revision]")
    _reading_arguments(check)
    known = parser.parse_args(arguments)

    from model.checkpoint_folder import CheckpointError
    from model.families.keys import FamilyError
    from model.families.reader import WeightFilesError

    run = {"import": _import, "export": _export, "check": _check}[known.command]
    try:
        run(known)
    except (FamilyError, WeightFilesError, CheckpointError, ValueError, OSError) as error:
        print(f"python -m model: {error}", file=sys.stderr)
        return 2
    return 0


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", required=True, help="a folder, or hub:owner/name[@revision]"
    )
    parser.add_argument("--to", required=True, help="the checkpoint folder to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the dense arrays; else as the files hold them"
    )
    _reading_arguments(parser)
    _mesh_arguments(parser)


def _reading_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-pickle", action="store_true", help="also read .bin files, running no code in them"
    )
    parser.add_argument(
        "--ignore-keys",
        default="",
        metavar="A,B",
        help="keys of config.json that are known not to change numbers",
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a checkpoint or run folder")
    parser.add_argument("--to", required=True, help="the folder to write")
    parser.add_argument("--family", help="write it as this family; else as it was imported")
    parser.add_argument("--dtype", choices=DTYPES, help="of the dense tensors; else as they are")
    parser.add_argument(
        "--quantized",
        choices=LAYOUTS,
        help="write weight formats as they are, in this layout; else all is dense",
    )
    parser.add_argument(
        "--max-shard-bytes", type=float, default=5e9, help="the largest weight file (5e9)"
    )
    _mesh_arguments(parser)


def _mesh_arguments(parser: argparse.ArgumentParser) -> None:
    lines = dict(
        line.strip().split(": ", 1)
        for line in (MeshConfig.__doc__ or "").splitlines()
        if line.startswith("    ") and ": " in line
    )
    for field in dataclasses.fields(MeshConfig):
        parser.add_argument(
            f"--mesh.{field.name}", type=int, dest=f"mesh_{field.name}", help=lines[field.name]
        )


def _layout(known: argparse.Namespace):
    """The layout of the mesh flags; None without any on one device."""
    import jax

    from sharding import make_layout, make_mesh

    sizes = {f.name: getattr(known, f"mesh_{f.name}") for f in dataclasses.fields(MeshConfig)}
    given = {name: size for name, size in sizes.items() if size is not None}
    if not given and jax.device_count() == 1:
        return None
    # Unless told otherwise, every device holds a part of the weights and not the whole.
    config = MeshConfig(**given) if given else MeshConfig(data=1, fsdp=-1)
    return make_layout(make_mesh(config))


def _import(known: argparse.Namespace) -> None:
    from model.families.importer import import_checkpoint
    from model.parameters import count_parameters

    began = time.monotonic()
    with _progress("reading") as progress:
        found = import_checkpoint(
            known.source,
            known.to,
            dtype=known.dtype,
            layout=_layout(known),
            allow_pickle=known.allow_pickle,
            ignore_keys=tuple(filter(None, known.ignore_keys.split(","))),
            progress=progress,
        )
    print(
        f"{known.to}: {found.provenance['family']}, {count_parameters(found.config):,} parameters, "
        f"{len(found.files)} files beside, {time.monotonic() - began:.1f} s"
    )


def _export(known: argparse.Namespace) -> None:
    from model.families.exporter import export_checkpoint

    began = time.monotonic()
    with _progress("writing") as progress:
        folder = export_checkpoint(
            known.checkpoint,
            known.to,
            family=known.family,
            dtype=known.dtype,
            layout=_layout(known),
            max_shard_bytes=int(known.max_shard_bytes),
            quantized=known.quantized,
            progress=progress,
        )
    print(f"{folder}: written in {time.monotonic() - began:.1f} s")


def _check(known: argparse.Namespace) -> None:
    """Print what a folder is; a fault in its config or tensors is an error."""
    from model.config import ModelConfig
    from model.families.checks import check_files
    from model.families.family import config_from_hf
    from model.families.hub import resolve
    from model.families.importer import read_config
    from model.families.quantized import split_config
    from model.families.reader import open_weights
    from model.families.registry import find
    from model.parameters import count_parameters

    folder = resolve(known.source, allow_pickle=known.allow_pickle)
    ignore = tuple(filter(None, known.ignore_keys.split(",")))
    values, quantized = split_config(read_config(folder), ignore)
    family = find(values, str(folder))
    config = config_from_hf(family, values, ignore)
    with open_weights(folder, allow_pickle=known.allow_pickle) as files:
        names, coded = check_files(files, family, config, quantized)
        layers = {f"{module.name}.weight" for found in coded.values() for module in found}
        dense = [name for name in names.values() if name not in layers]
        stored = sorted({str(files.tensors[name].dtype) for name in dense})
    codes = "" if quantized is None else f", {len(layers)} of them in codes of {quantized.layout}"
    print(
        f"{folder}: {family.name}, {count_parameters(config):,} parameters in {len(names)} tensors "
        f"({', '.join(stored)}{codes}); every tensor has its place"
    )
    plain = ModelConfig()
    for field in dataclasses.fields(ModelConfig):
        value = getattr(config, field.name)
        if value != getattr(plain, field.name):
            print(f"  {field.name} = {value!r}")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, silence elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TransferSpeedColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
