"""The flags of `serve.py`: the checkpoint, and one for each setting of engine, server and mesh."""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from serving.server.settings import ServerSettings
from serving.settings import EngineSettings
from sharding import MeshConfig

KEY_VARIABLE = "SHEAF_API_KEY"
RENAMED = {
    "allowed_origins": "allowed-origin",
    "api_keys": "api-key",
    "served_names": "served-name",
}
"""Flags that may come several times, by field."""
DESCRIPTION = """\
Serve a checkpoint: a run or checkpoint folder, a Hugging Face folder, or hub:owner/name.

  python serve.py --checkpoint=runs/quickstart
  python serve.py --checkpoint=hub:owner/name --port=8001 --max-model-len=4096
  python serve.py --checkpoint=runs/base --adapter=law=adapters/law --adapter=tales=runs/tales

The environment's SHEAF_API_KEY is an API key too. The first SIGTERM or Ctrl-C lets requests end,
a second one does not. The status is 0, 1 if the engine failed, 2 for wrong input, 3 if requests
were cut short. SHEAF_TRACEBACK=1 shows where an error came from.
"""


@dataclass(frozen=True)
class Command:
    """A parsed command line; mesh is None where no axis was given. adapters: name -> folder."""

    checkpoint: str
    engine: EngineSettings
    server: ServerSettings
    mesh: MeshConfig | None
    adapters: dict[str, str]


def parse(arguments: Sequence[str] | None = None) -> Command:
    """Read the flags. Raises `ValueError` for a wrong setting, exits for an unknown flag."""
    parser = argparse.ArgumentParser(
        prog="serve.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="a folder, or hub:owner/name")
    text = "an adapter to serve too, under a name that requests give as model; may come again"
    parser.add_argument("--adapter", action="append", metavar="NAME=FOLDER", help=text)
    kinds = ((ServerSettings, ""), (EngineSettings, ""), (MeshConfig, "mesh."))
    for kind, prefix in kinds:
        add_fields(parser.add_argument_group(kind.__name__), kind, prefix)
    known = vars(parser.parse_args(arguments))
    server, engine, mesh = (given(known, kind, prefix) for kind, prefix in kinds)
    if key := os.environ.get(KEY_VARIABLE):
        server["api_keys"] = (*server.get("api_keys", ()), key)
    return Command(
        known["checkpoint"],
        EngineSettings(**engine),
        ServerSettings(**server),
        MeshConfig(**mesh) if mesh else None,
        _adapters(known["adapter"] or []),
    )


def _adapters(flags: Sequence[str]) -> dict[str, str]:
    """`{name: folder}`. Raises `ValueError` for a flag without both, and a name given twice."""
    found: dict[str, str] = {}
    for flag in flags:
        name, _, folder = flag.partition("=")
        if not name or not folder:
            raise ValueError(f"--adapter={flag}: it must be NAME=FOLDER")
        if name in found:
            raise ValueError(f"--adapter={flag}: there is an adapter {name} already")
        found[name] = folder
    return found


def given(known: dict[str, Any], kind: type, prefix: str = "") -> dict[str, Any]:
    """The fields of a dataclass that the command line sets."""
    values = {field.name: known[prefix + field.name] for field, _ in settable(kind)}
    listed = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return {name: value for name, value in listed.items() if value is not None}


def add_fields(group: Any, kind: type, prefix: str = "") -> None:
    """A flag for each field of a dataclass, its help from the docstring."""
    texts = field_texts(kind)
    for field, hint in settable(kind):
        flag = RENAMED.get(field.name, (prefix + field.name).replace("_", "-"))
        text = f"{texts.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        options: dict[str, Any] = {"dest": prefix + field.name, "default": None, "help": text}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.name in RENAMED:
            options |= {"action": "append", "metavar": "TEXT"}
        elif isinstance(hint, types.GenericAlias):
            options |= {"type": _integers, "metavar": "N,N"}
        else:
            options |= {"type": hint, "metavar": hint.__name__.upper()}
        group.add_argument(f"--{flag}", **options)


def settable(kind: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    """The fields that a flag can set, with the type of a value."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if typing.get_origin(hint) is types.UnionType:
            hint = next(each for each in typing.get_args(hint) if each is not type(None))
        if typing.get_origin(hint) is typing.Literal:
            hint = str
        if hint in (int, float, str, bool) or isinstance(hint, types.GenericAlias):
            yield field, hint


def field_texts(kind: type) -> dict[str, str]:
    """`{field: what its docstring says}`; lines that are indented deeper go on with the last."""
    found: dict[str, str] = {}
    names, last = [field.name for field in dataclasses.fields(kind)], []
    for line in (kind.__doc__ or "").splitlines():
        head, colon, text = line.strip().partition(": ")
        said = [name.strip() for name in head.split(",")]
        if colon and all(name in names for name in said):
            last = said
            found |= dict.fromkeys(said, text)
        elif last and line.startswith("        "):
            found |= {name: f"{found[name]} {line.strip()}" for name in last}
        else:
            last = []
    return found


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
