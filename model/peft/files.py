"""Adapters as Hugging Face PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.

    params = load_peft("folder", config, params)
    save_peft("folder", config, params)

PEFT keeps `lora_A [r, d_in]` and `lora_B [d_out, r]` of each linear layer; ours are their
transposes, stacked over layers. Where layers differ in rank the smaller ones are filled up with
zeros on both sides, which stay zero in training. A layer that is packed in their files (query, key
and value in one matrix) takes the columns of its `lora_B` that are ours.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from model.checkpoint_folder import write_bytes
from model.config import ModelConfig
from model.families.exporter import describe_as
from model.families.reader import WeightFiles
from model.families.safetensors_format import file_order, make_header, read_header
from model.peft.config import (
    CONFIG,
    AdapterConfig,
    AdapterFileError,
    altered_base,
    read_config,
)
from model.peft.modules import Module, by_path, linear_modules
from model.peft.whole_modules import WholeModules
from model.segments import segments_of
from weights import LowRank, flatten, from_flat, nearest

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
Arrays = dict[str, np.ndarray]


def load_peft(
    folder: str | Path,
    config: ModelConfig,
    params: Any,
    *,
    family: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> Any:
    """The params with an adapter of PEFT's beside the weights that it was trained for.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        config: of the model.
        params: of the model; weights may be any format.
        family: whose module names the adapter has; None finds it as an export does.
        base: the model's own `config.json`, if it was imported.

    Raises:
        AdapterFileError: a field, a tensor or a shape that does not fit, by name and file.
    """
    flat = flatten(params)
    low_rank, whole = read_peft(folder, config, params, family=family, base=base)
    return from_flat(flat | whole | low_rank)


def read_peft(
    folder: str | Path,
    config: ModelConfig,
    params: Any,
    *,
    family: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> tuple[dict[str, LowRank], dict[str, Any]]:
    """`({our path: weight with adapter}, {our path: weight that the adapter stores whole})`.

    Arguments and errors are those of `load_peft`.
    """
    folder = Path(folder)
    settings = read_config(folder)
    tensors = _read(folder)
    chosen = describe_as(config, family, base)[0]
    segments = segments_of(params, config)
    modules = linear_modules(chosen, config, segments)
    pairs, rest = _pairs(folder, tensors)
    _check_modules(folder, settings, modules, pairs)
    name = altered_base(settings)
    if name is not None:
        warnings.warn(
            f"{settings.path}: init_lora_weights is {name!r}, which altered the base: this adapter "
            "is right only beside the altered base",
            stacklevel=3,
        )
    flat = flatten(params)
    whole = WholeModules(chosen, config, segments, folder / WEIGHTS).replaced(flat, rest)
    flat |= whole
    low_rank = {
        path: _low_rank(flat[path], held, pairs, settings)
        for path, held in by_path(modules).items()
        if any(module.name in pairs for module, _ in held)
    }
    return low_rank, whole


def save_peft(
    folder: str | Path,
    config: ModelConfig,
    params: Any,
    *,
    family: str | None = None,
    base: Mapping[str, Any] | None = None,
    base_model: str = "",
) -> Path:
    """Write the adapters of a model, alone, as PEFT's files.

    Args:
        folder: to write; must hold no adapter.
        config: of the model.
        params: with `LowRank` weights; all else is left out.
        family: whose module names to write; None finds it as an export does.
        base: the model's own `config.json`, if it was imported.
        base_model: name or folder of the base, for `base_model_name_or_path`.

    Raises:
        AdapterFileError: the folder holds an adapter, or there is nothing to write.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists():
            raise AdapterFileError(f"{folder / name} exists; an adapter is never overwritten")
    chosen = describe_as(config, family, base)[0]
    modules = linear_modules(chosen, config, segments_of(params, config))
    flat = flatten(params)
    ours = {path for path, weight in flat.items() if isinstance(weight, LowRank)}
    unknown = sorted(ours - set(by_path(modules)))
    if unknown:
        raise AdapterFileError(f"family {chosen.name!r} has no linear layer for {unknown[0]}")
    factors = {
        module.name: found
        for module in modules.values()
        if (found := _factors(module, flat)) is not None
    }
    if not factors:
        raise AdapterFileError("these params have no adapters; surgery.adapt.attach makes them")
    tensors = {
        f"{PREFIX}{name}.lora_{letter}.weight": np.ascontiguousarray(array.T)
        for name, (a, b, _) in factors.items()
        for letter, array in (("A", a), ("B", b))
    }
    dropouts = {weight.dropout for weight in flat.values() if isinstance(weight, LowRank)}
    written = _config(modules, factors, base_model, max(dropouts))
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS, _file_bytes(tensors))
    write_bytes(folder / CONFIG, (json.dumps(written, indent=2, sort_keys=True) + "\n").encode())
    return folder


def _read(folder: Path) -> Arrays:
    path = folder / WEIGHTS
    if not path.exists():
        pickled = " (a .bin file is not read: save it as safetensors)"
        raise AdapterFileError(
            f"{path}: there is none" + (pickled if (folder / "adapter_model.bin").exists() else "")
        )
    with WeightFiles(folder, read_header(path)) as files:
        return {name: files.read(name) for name in files.tensors}


def _pairs(folder: Path, tensors: Arrays) -> tuple[dict[str, Arrays], Arrays]:
    """`{module: {"A", "B"}}`, and what is stored whole, by its name without the prefix."""
    pairs: dict[str, Arrays] = {}
    rest: Arrays = {}
    for name, array in tensors.items():
        if not name.startswith(PREFIX):
            raise AdapterFileError(f"{folder / WEIGHTS}: {name} does not begin with {PREFIX}")
        bare = name.removeprefix(PREFIX)
        found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", bare)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = array.astype(np.float32)
        elif "lora_" in bare:
            raise AdapterFileError(
                f"{folder / WEIGHTS}: {name} is not read here: adapters of linear layers are"
            )
        else:
            # An adapted head's base is stored beside its adapter.
            plain = re.sub(r"\.(modules_to_save\.default|base_layer)\.", ".", bare)
            rest[plain] = array
    return pairs, rest


def _check_modules(
    folder: Path,
    settings: AdapterConfig,
    modules: Mapping[str, Module],
    pairs: Mapping[str, Arrays],
) -> None:
    where = folder / WEIGHTS
    for name, pair in pairs.items():
        if name not in modules:
            close = nearest(name, modules) or "none"
            raise AdapterFileError(
                f"{where}: this model has no linear layer {name}; nearest: {close}"
            )
        if len(pair) != 2:
            there, missing = ("A", "B") if "A" in pair else ("B", "A")
            raise AdapterFileError(f"{where}: {name} has lora_{there} but no lora_{missing}")
        rank, module = settings.rank(name), modules[name]
        wanted = {"A": (rank, module.d_in), "B": (module.d_out, rank)}
        for letter, shape in wanted.items():
            if pair[letter].shape != shape:
                raise AdapterFileError(
                    f"{where}: {name}.lora_{letter} is {list(pair[letter].shape)}; {CONFIG} and "
                    f"the base make it {list(shape)}"
                )
        if not settings.means(name):
            raise AdapterFileError(f"{where}: holds {name}, which {CONFIG} does not mean")
    absent = [name for name in modules if settings.means(name) and name not in pairs]
    if absent or not pairs:
        shown = ", ".join(absent[:5]) or "any of this model's linear layers"
        raise AdapterFileError(f"{where}: no adapter of {shown}, which {CONFIG} means")


def _low_rank(
    base: Any, held: list[Any], pairs: Mapping[str, Arrays], settings: AdapterConfig
) -> LowRank:
    """One of our weights: layers side by side, each filled up to the largest rank."""
    found = [(module, part, pairs.get(module.name)) for module, part in held]
    rank = max(len(pair["A"]) for _, _, pair in found if pair)
    a = np.zeros((len(found), found[0][0].d_in, rank), np.float32)
    b = np.zeros((len(found), rank, len(found[0][1].columns)), np.float32)
    scale = np.ones(len(found), np.float32)
    for place, (module, part, pair) in enumerate(found):
        if pair is not None:
            own = len(pair["A"])
            a[place, :, :own] = pair["A"].T
            b[place, :own] = pair["B"].T[:, part.columns]
            scale[place] = settings.scale(module.name)
    if held[0][1].layer is None:
        a, b, scale = a[0], b[0], scale[0]
    return LowRank(base, jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale), settings.dropout())


def _factors(module: Module, flat: Mapping[str, Any]) -> tuple[Any, Any, float] | None:
    """`a [d_in, r]`, `b [r, d_out]` and the scale of one of their modules; None without adapter.

    Parts that do not share `a` stand side by side: the rank is the sum of theirs.
    """
    parts = []
    for part in module.parts:
        weight = flat[part.path]
        if isinstance(weight, LowRank):
            at = () if part.layer is None else (part.layer,)
            a, b = np.asarray(weight.a[at], np.float32), np.asarray(weight.b[at], np.float32)
            used = a.any(axis=0) | b.any(axis=1)
            if used.any():
                parts.append((part, a[:, used], b[used], float(np.asarray(weight.scale)[at])))
    if not parts:
        return None
    _, first, _, scale = parts[0]
    shared = all(np.array_equal(first, a) for _, a, _, _ in parts)
    a = first if shared else np.concatenate([a for _, a, _, _ in parts], axis=1)
    b, row = np.zeros((a.shape[1], module.d_out), np.float32), 0
    for part, own, ours, own_scale in parts:
        rows = slice(row, row + own.shape[1])
        b[rows, part.columns] = ours if own_scale == scale else ours * (own_scale / scale)
        row += 0 if shared else own.shape[1]
    return a, b, scale


def _config(
    modules: Mapping[str, Module], factors: Mapping[str, Any], base_model: str, dropout: float
) -> dict[str, Any]:
    """What `adapter_config.json` says: the commonest rank and alpha, patterns for the others."""
    ranks = {name: a.shape[1] for name, (a, _, _) in factors.items()}
    alphas = {name: _tidy(scale * ranks[name]) for name, (_, _, scale) in factors.items()}
    rank, alpha = (_commonest(list(values.values())) for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": any(modules[name].conv1d for name in factors),
        "target_modules": _target_modules(modules, factors),
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(n): x for n, x in alphas.items() if x != alpha},
        "inference_mode": True,
    }


def _target_modules(modules: Mapping[str, Module], factors: Mapping[str, Any]) -> list[str] | str:
    """Last names where they mean exactly these modules, else a regex of the full names."""
    ends = sorted({name.split(".")[-1] for name in factors})
    meant = {name for name in modules if name.split(".")[-1] in ends}
    return ends if meant == set(factors) else "|".join(re.escape(name) for name in factors)


def _commonest(values: list[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)


def _tidy(alpha: float) -> float | int:
    """Alpha as it was before a float32 divided it."""
    near = round(alpha, 4)
    near = near if abs(near - alpha) < 1e-6 * max(1.0, abs(alpha)) else alpha
    return int(near) if near == int(near) else near


def _file_bytes(tensors: Arrays) -> bytes:
    names = file_order({name: array.dtype for name, array in tensors.items()})
    header = make_header(
        [(name, tensors[name].shape, tensors[name].dtype) for name in names], {"format": "pt"}
    )
    return header + b"".join(tensors[name].tobytes() for name in names)
