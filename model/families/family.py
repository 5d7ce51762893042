"""What a family is: keys of its `config.json`, tensors of its weights, and nothing that runs.

There is one decoder in Sheaf; a family says which fields of `ModelConfig` its models set and where
their arrays lie. `config_from_hf` and `config_to_hf` use the one list of keys in both directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from model.config import GLOBAL_FIELDS, ModelConfig
from model.families.keys import FamilyError, Keys, Values, known
from model.families.tensors import Tensor
from weights import nearest


@dataclass(frozen=True)
class Family:
    """One family of published models.

    name: what users call it, `--family=NAME`.
    model_types: values of `model_type` in `config.json` that are this family; the first is written.
    architecture: the class in `architectures`.
    fixed: fields of `ModelConfig` that hold for every model of the family.
    keys: their config, both ways.
    tensors: their weights, both ways; those whose arrays a config does not have are left out.
    prefix: what the base model's names begin with; checkpoints without it are read too.
    buffers: patterns of names that hold no weights and are passed over.
    stores_tied_head: their file holds the head although it is the embedding.
    written_as: the family that its models are written as, where only a part of a file is read.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    fixed: Mapping[str, Any]
    keys: tuple[Keys, ...]
    tensors: tuple[Tensor, ...]
    prefix: str = "model."
    buffers: tuple[str, ...] = ()
    stores_tied_head: bool = False
    written_as: str | None = None


def config_from_hf(family: Family, values: Values, ignore: Iterable[str] = ()) -> ModelConfig:
    """The model that a `config.json` of this family describes.

    Raises `FamilyError` for a key that is neither understood nor inert (unless its value is null or
    it is in `ignore`), for a value that Sheaf has no equal for, and for sizes that do not fit.
    """
    fields = fields_from_hf(family, values, ignore)
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise FamilyError(f"config.json of family {family.name!r}: {error}") from error


def fields_from_hf(family: Family, values: Values, ignore: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of `ModelConfig` that a `config.json` of this family sets; raises as
    `config_from_hf` does.
    """
    understood = known(family.keys) | set(ignore)
    unknown = [
        name for name, value in values.items() if name not in understood and value is not None
    ]
    if unknown:
        shown = "; ".join(
            f"{name} = {values[name]!r} (nearest: {nearest(name, understood) or 'none'})"
            for name in unknown[:5]
        )
        raise FamilyError(
            f"config.json of family {family.name!r} has keys that Sheaf does not know and that may "
            f"change numbers: {shown}; if they do not, name them in ignore_keys"
        )
    fields: dict[str, Any] = dict(family.fixed)
    for keys in family.keys:
        for name, value in keys.read(values).items():
            merged = (*fields.get(name, ()), *value) if name == "layer_overrides" else value
            fields[name] = merged
    return fields


def config_to_hf(family: Family, config: ModelConfig, base: Values | None = None) -> dict[str, Any]:
    """The `config.json` of a model, upon `base` (the file that it was imported from).

    Raises `FamilyError` naming the fields that the family cannot say.
    """
    resolved = config.resolve()
    values: dict[str, Any] = {
        **(base or {}),
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
    }
    if base and base.get("model_type") in family.model_types:
        values["model_type"] = base["model_type"]
        values["architectures"] = base.get("architectures") or [family.architecture]
    for keys in family.keys:
        for name in keys.names:
            values.pop(name, None)
    for keys in family.keys:
        values.update(keys.write(resolved))
    differing = differences(config, config_from_hf(family, values, values))
    if differing:
        raise FamilyError(f"family {family.name!r} cannot say {'; '.join(differing[:4])}")
    return values


NOT_IN_FILES = frozenset({"init_std", "dropout", "base_d_model", "max_length", "capacity_factor"})
"""Fields that change no forward pass of a published model, and that a file may leave out."""

LAYER_FIELDS = frozenset(entry.name for entry in dataclasses.fields(ModelConfig)) - GLOBAL_FIELDS
"""Fields that may differ from layer to layer."""


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """`model.field is A here, B there` for each field in which two models compute differently, or
    `layer 3: field is A, there B` where only some layers do.
    """
    outer = GLOBAL_FIELDS - NOT_IN_FILES - {"layer_overrides"}
    found = [
        f"model.{name} is {here!r}, there {there!r}"
        for name in _names(outer)
        if not _equal(
            here := getattr(ours.resolve(), name), there := getattr(theirs.resolve(), name)
        )
    ]
    if ours.num_layers != theirs.num_layers:
        return found
    layers = [(ours.layer(index), theirs.layer(index)) for index in range(ours.num_layers)]
    for name in _names(LAYER_FIELDS - NOT_IN_FILES):
        found += _differing_layers(name, layers)
    return found


def _differing_layers(name: str, layers: list[tuple[ModelConfig, ModelConfig]]) -> list[str]:
    values = [
        (index, getattr(here, name), getattr(there, name))
        for index, (here, there) in enumerate(layers)
        if not (name == "d_ff" and here.feed_forward == there.feed_forward == "experts")
    ]
    differing = [(index, a, b) for index, a, b in values if not _equal(a, b)]
    if len(differing) == len(layers):
        _, here, there = differing[0]
        return [f"model.{name} is {here!r}, there {there!r}"]
    return [f"layer {index}: {name} is {a!r}, there {b!r}" for index, a, b in differing]


def _names(fields: frozenset[str]) -> list[str]:
    """Fields in the order of the dataclass."""
    return [entry.name for entry in dataclasses.fields(ModelConfig) if entry.name in fields]


def _equal(here: Any, there: Any) -> bool:
    """Equal, or floats that differ by the rounding of a formula and its inverse."""
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=1e-12)
    return here == there
