"""The keys of rotary embeddings, old spelling (`rope_theta`, `rope_scaling`) and new
(`rope_parameters`), to the fields of `ModelConfig` and back.

The old spelling is written: every version of transformers reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig, RopeScaling
from model.families.keys import FamilyError, Keys, Values
from weights import nearest

KINDS = {
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}
"""Their `rope_type` -> ours, but for "default"."""

SAME = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "original_max_position_embeddings": "original_max_length",
}
"""Their key within the scaling -> field of `RopeScaling`, equal in value."""

WRITTEN = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor"),
}
"""Our kind -> their keys that it is written with."""


def rope(
    default_base: float = 10000.0,
    *,
    max_length: str = "max_position_embeddings",
    default_max_length: int = 2048,
    partial: float | None = None,
    default_sizes: tuple[int, int] | None = None,
    base_name: str = "rope_theta",
    partial_name: str = "partial_rotary_factor",
) -> Keys:
    """The keys of one rotary embedding for all layers.

    Args:
        default_base: base of an absent `rope_theta`.
        max_length: the key of the longest sequence, which some scalings refer to.
        default_max_length: its value when absent.
        partial: share of the head that rotates when the key is absent; None: the family rotates
            whole heads, whatever a key says, so a key that says otherwise is an error.
        default_sizes: d_model and heads when they are absent, which the share needs.
        base_name: spelling of `rope_theta` (GPT-NeoX: `rotary_emb_base`).
        partial_name: spelling of `partial_rotary_factor` (GPT-NeoX: `rotary_pct`).
    """
    names = (
        *dict.fromkeys((base_name, "rope_theta", partial_name, "partial_rotary_factor")),
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
    )

    def read(values: Values) -> dict[str, Any]:
        given = values.get("rope_parameters") or values.get("rope_scaling") or {}
        longest = values.get(max_length) or default_max_length
        original = values.get("original_max_position_embeddings")
        base = _first(given.get("rope_theta"), values.get(base_name), values.get("rope_theta"))
        fields: dict[str, Any] = {
            "rope_base": float(_first(base, default_base)),
            "rope_scaling": scaling(given, longest, original),
        }
        share = _first(
            given.get("partial_rotary_factor"),
            values.get(partial_name),
            values.get("partial_rotary_factor"),
            partial,
        )
        if share is not None and share != 1.0 and partial is None:
            raise FamilyError(f"{partial_name} is {share!r}; this family rotates whole heads")
        if share is not None and share != 1.0:
            fields["rotary_dim"] = int(_head_dim(values, default_sizes) * share)
        return fields

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.head_dim is not None
        assert config.rotary_dim is not None
        values: dict[str, Any] = {base_name: config.rope_base}
        values["rope_scaling"] = scaling_to_hf(config.rope_scaling)
        if partial is not None or config.rotary_dim != config.head_dim:
            values[partial_name] = config.rotary_dim / config.head_dim
        kind = None if config.rope_scaling is None else config.rope_scaling.kind
        if config.rope_scaling is not None and kind == "longrope":
            values["original_max_position_embeddings"] = config.rope_scaling.original_max_length
        return values

    return Keys(names, read, write)


def scaling(
    given: Mapping[str, Any], longest: int, original: int | None = None
) -> RopeScaling | None:
    """Their scaling, in either spelling, as ours; None if there is none.

    Args:
        given: `rope_scaling` or `rope_parameters`.
        longest: the longest sequence of the model, in tokens.
        original: `original_max_position_embeddings` where it stands outside of the scaling.
    """
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return None
    if kind not in KINDS:
        close = nearest(str(kind), KINDS) or ", ".join(KINDS)
        raise FamilyError(
            f"rope_scaling has rope_type {kind!r}, which is unknown; nearest: {close}"
        )
    lists = ("short_factor", "long_factor") if KINDS[kind] == "longrope" else ()
    passed = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *lists}
    unknown = set(given) - set(SAME) - passed
    if unknown:
        name = sorted(unknown)[0]
        close = nearest(name, SAME) or ", ".join(SAME)
        raise FamilyError(f"rope_scaling.{name} = {given[name]!r} is unknown; nearest: {close}")
    fields = {ours: given[name] for name, ours in SAME.items() if given.get(name) is not None}
    fields["kind"] = KINDS[kind]
    trained = original or fields.get("original_max_length") or longest
    fields["original_max_length"] = longest if kind == "dynamic" else trained
    if fields["kind"] in ("longrope", "yarn"):
        fields.setdefault("factor", longest / trained)
    for name in lists:
        fields[name] = tuple(float(value) for value in given[name])
    return RopeScaling(**fields)


def scaling_to_hf(ours: RopeScaling | None) -> dict[str, Any] | None:
    """Our scaling in their spelling, for every version of transformers."""
    if ours is None:
        return None
    values: dict[str, Any] = {"rope_type": ours.kind, "type": ours.kind}
    for name in WRITTEN[ours.kind]:
        value = getattr(ours, SAME[name])
        absent = value is None or (name in ("mscale", "mscale_all_dim") and value == 0.0)
        if not absent:
            values[name] = value
    if ours.kind == "longrope":
        values["short_factor"] = list(ours.short_factor)
        values["long_factor"] = list(ours.long_factor)
    return values


def _head_dim(values: Values, default_sizes: tuple[int, int] | None) -> int:
    if values.get("head_dim"):
        return int(values["head_dim"])
    default_width, default_heads = default_sizes or (None, None)
    width = _first(values.get("hidden_size"), values.get("n_embd"), default_width)
    heads = _first(values.get("num_attention_heads"), values.get("n_head"), default_heads)
    if not width or not heads:
        raise FamilyError("hidden_size or num_attention_heads is missing")
    return int(width) // int(heads)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def plain_length(default: int = 2048) -> Keys:
    """`max_position_embeddings` as `max_length`."""

    def read(values: Values) -> dict[str, Any]:
        return {"max_length": int(values.get("max_position_embeddings") or default)}

    return Keys(
        ("max_position_embeddings",),
        read,
        lambda config: {"max_position_embeddings": config.max_length},
    )


def attention_scale_from(theirs: str, default: float) -> Keys:
    """A key whose inverse root multiplies q . k (Gemma's `query_pre_attn_scalar`)."""

    def read(values: Values) -> dict[str, Any]:
        return {"attention_scale": float(values.get(theirs, default)) ** -0.5}

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.attention_scale is not None
        value = config.attention_scale**-2
        return {theirs: round(value) if math.isclose(value, round(value)) else value}

    return Keys((theirs,), read, write)
