"""Dataclasses of settings as arguments of a command: flags, types, defaults and help at once."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any


def add_fields(group: Any, cls: type, prefix: str) -> None:
    """An argument for each field of a dataclass, its help from the docstring."""
    texts, hints = _field_texts(cls), typing.get_type_hints(cls)
    for field in plain_fields(cls):
        name, kind = prefix + field.name, hints[field.name]
        text = f"{texts[field.name]} (default: {field.default})".replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, dest=name, action=action, default=None, help=text)
        else:
            group.add_argument(flag, dest=name, type=kind, help=text, metavar=kind.__name__.upper())


def plain_fields(cls: type) -> list[dataclasses.Field]:
    """The fields that an argument can set; a tuple is what a method itself found out."""
    return [field for field in dataclasses.fields(cls) if not isinstance(field.default, tuple)]


def _field_texts(cls: type) -> dict[str, str]:
    """`{field: what its docstring, or a base's, says}`; lines that are indented deeper go on with
    the last.
    """
    found: dict[str, str] = {}
    names, last = {field.name for field in dataclasses.fields(cls)}, ""
    texts = [base.__doc__ or "" for base in reversed(cls.__mro__)]
    for line in "\n".join(texts).splitlines():
        name, colon, text = line.strip().partition(": ")
        if colon and name in names:
            last, found[name] = name, text
        elif last and line.startswith("        "):
            found[last] += " " + line.strip()
        else:
            last = ""
    return found
