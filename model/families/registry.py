"""The families that can be read and written, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.families.family import Family
from model.families.keys import FamilyError
from model.families.llama import LLAMA
from weights import nearest

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
}
"""Name -> family; the first that can say a model's config is the one it is exported as."""


def find(values: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`, by its `model_type`; raises `FamilyError` with the known."""
    wanted = values.get("model_type")
    for family in FAMILIES.values():
        if wanted in family.model_types:
            return family
    known = [name for family in FAMILIES.values() for name in family.model_types]
    raise FamilyError(
        f"{where}/config.json: model_type {wanted!r} is no family that Sheaf reads; nearest: "
        f"{nearest(str(wanted), known) or 'none'}; known: {', '.join(known)}"
    )
