"""Weight formats as the quantized layers of a Hugging Face folder: their tensors and settings.

A folder has one `quantization_config`, so layers that do not agree in what it says are refused, by
name, before anything is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from model.families.keys import FamilyError
from model.families.plan import Source, names
from model.families.quantized import READ, check_linear
from weights import ActQuant, Grouped, Int8, Lut, Permuted, float4, is_format, normal_float
from weights.interop import LayoutError, awq, bitsandbytes, gptq
from weights.interop.columns import join_columns
from weights.second_order import values_of

Entry = tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]
Write = Callable[[Any], tuple[dict[str, np.ndarray], dict[str, Any]]]

ANY = ("desc_act", "zero_point", "bnb_4bit_use_double_quant")
"""Settings that are true of a folder if they are of one layer; `sym` must be true of all."""


def check_method(method: str) -> None:
    """Raise `FamilyError` for an unknown layout."""
    if method not in READ:
        raise FamilyError(f"quantized={method!r} is not one of {', '.join(READ)}")


def is_quantized(parts: Sequence[Source], held: Sequence[Any], name: str) -> bool:
    """Whether a tensor of theirs holds weight formats; `FamilyError` if only a part of it does, or
    if it is no linear layer.
    """
    formats = [is_format(weight) for weight in held]
    if not any(formats):
        return False
    for part in parts:
        check_linear(part, name)
    if not all(formats):
        dense = ", ".join(p.path for p, form in zip(parts, formats, strict=True) if not form)
        raise FamilyError(f"{name} would be quantized in part: {dense} is dense")
    return True


def joined(parts: Sequence[Source], held: Sequence[Any], name: str) -> Any:
    """The weight `[K, N]` of one layer of theirs, from those of ours that it packs."""
    if parts[0].rows is None:
        return held[0]
    try:
        return join_columns(held, [part.rows for part in parts if part.rows is not None])
    except LayoutError as error:
        raise FamilyError(f"{name}: {error}") from error


def plan(
    method: str, layers: Mapping[str, Callable[[], Any]], dtype: str
) -> tuple[dict[str, list[Entry]], dict[str, Any]]:
    """The tensors of each quantized layer, and the folder's `quantization_config`.

    Args:
        method: gptq, awq or bitsandbytes.
        layers: `{NAME.weight: function that gives the weight}`; called to plan and to write.
        dtype: what the dense rest is in, which bitsandbytes computes in.

    Raises `FamilyError` naming the layer that the layout, or one setting for all, cannot say.
    """
    if not layers:
        raise FamilyError(f"no weight of this checkpoint is in codes; {method} has nothing to hold")
    writers: dict[str, tuple[Write, ...]] = {
        "gptq": (gptq.write, functools.partial(gptq.write, version="gptq_v2")),
        "awq": (awq.write,),
        "bitsandbytes": (functools.partial(_write_bitsandbytes, dtype=dtype),),
    }
    errors = []
    for write in writers[method]:
        try:
            return _plan(_Written(write, layers), layers)
        except FamilyError as error:
            errors.append(error)
    raise errors[0]


class _Written:
    """The tensors of a layer when they are asked for; those of the last one are kept."""

    def __init__(self, write: Write, layers: Mapping[str, Callable[[], Any]]):
        self._write, self._layers, self._last = write, layers, ("", {}, {})

    def layer(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Tensors and settings of one layer; `FamilyError` if the layout cannot say it."""
        if self._last[0] != name:
            weight = self._layers[name]()
            try:
                _check_scales(weight)
                arrays, settings = self._write(weight)
            except LayoutError as error:
                raise FamilyError(f"{name}: {error}; export it dense, without quantized") from error
            base = weight.base if isinstance(weight, Permuted) else weight
            sizes = {"rows": base.shape[0], "group": getattr(base, "group", None)}
            self._last = (name, arrays, {**settings, **sizes})
        return self._last[1:]

    def array(self, name: str, last: str) -> np.ndarray:
        """One tensor of a layer."""
        return self.layer(name)[0][last]


def _plan(
    written: _Written, layers: Mapping[str, Any]
) -> tuple[dict[str, list[Entry]], dict[str, Any]]:
    entries: dict[str, list[Entry]] = {}
    settings = {}
    for name in layers:
        arrays, settings[name] = written.layer(name)
        module = name.removesuffix(".weight")
        entries[name] = [
            (f"{module}.{last}", a.shape, a.dtype, functools.partial(written.array, name, last))
            for last, a in arrays.items()
        ]
    return entries, _one_config(settings)


def _one_config(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of all layers as those of the folder."""
    first, config = next(iter(settings.items()))
    merged = {name: value for name, value in config.items() if name not in ("rows", "group")}
    for key in merged:
        values = {layer: found.get(key) for layer, found in settings.items()}
        if key in ANY or key == "sym":
            merged[key] = (all if key == "sym" else any)(values.values())
        elif key == "group_size":
            merged[key] = _group_size(settings)
        else:
            for layer, value in values.items():
                if value != merged[key]:
                    raise FamilyError(
                        f"{key} is {merged[key]!r} in {first} and {value!r} in {layer}; a folder "
                        "has one for all its layers"
                    )
    return merged


def _group_size(settings: Mapping[str, Mapping[str, Any]]) -> int:
    """The group of all layers, -1 where each has a single group."""
    sizes = {layer: s["group"] for layer, s in settings.items() if s["group_size"] != -1}
    if not sizes:
        return -1
    first, size = next(iter(sizes.items()))
    for layer, found in settings.items():
        if found["group"] != size:
            raise FamilyError(
                f"groups of {size} in {first} and of {found['group']} in {layer}; a folder has one "
                "size for all its layers"
            )
    return size


def _check_scales(weight: Any) -> None:
    """Raise `LayoutError` for scales that float16, which the layouts hold, would round."""
    base = weight.base if isinstance(weight, Permuted) else weight
    if not isinstance(base, Grouped):
        return
    scale = np.asarray(values_of(base.scale)).astype(np.float32)
    if (scale.astype(np.float16).astype(np.float32) != scale).any():
        raise LayoutError("its scales are not exact in float16, which the layout holds")


def _write_bitsandbytes(weight: Any, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if isinstance(weight, Int8):
        arrays, config = bitsandbytes.write(weight)
        return arrays, {**config, "llm_int8_threshold": _threshold(weight)}
    if not isinstance(weight, Lut):
        raise LayoutError(
            f"a {type(weight).__name__} has no bitsandbytes layout; Lut and Int8 have"
        )
    table = np.asarray(weight.table[0], np.float32)
    tables = {"nf4": normal_float.TABLE, "fp4": float4.table()}
    for kind, known in tables.items():
        known = np.asarray(known, np.float32)
        if table.shape == known.shape and np.allclose(table, known, atol=1e-6):
            return bitsandbytes.write(weight, kind, dtype)
    raise LayoutError("its table is neither that of nf4 nor that of fp4")


def _threshold(weight: Int8) -> float:
    """`llm_int8_threshold` of a weight; 0 codes every input."""
    if weight.act != ActQuant():
        raise LayoutError("bitsandbytes codes inputs too, in 8 bits, a scale for each row")
    if weight.outlier is None:
        return 0.0
    if weight.outlier.threshold is None:
        raise LayoutError("bitsandbytes finds outliers in each call; these are fixed")
    return weight.outlier.threshold


def left_out(
    method: str,
    config: Mapping[str, Any],
    tensors: Sequence[Source],
    layers: Iterable[str],
    head: str | None,
) -> dict[str, Any]:
    """The settings with the names of the linear layers that stay dense.

    Args:
        method: gptq, awq or bitsandbytes.
        config: of `plan`.
        tensors: a source of each tensor of the model.
        layers: the tensors that are written in codes.
        head: the tensor of the head, which readers have a layer for even if it is tied.
    """
    coded, dense = set(layers), [] if head is None else [head]
    for source in tensors:
        if source.tensor.transposed and source.path.endswith("/kernel"):
            dense += [] if source.tensor.by_expert else names(source)
    skipped = [name.removesuffix(".weight") for name in dict.fromkeys(dense) if name not in coded]
    if method == "bitsandbytes":
        return {**config, "llm_int8_skip_modules": skipped}
    if method == "awq":
        if head in coded:
            raise FamilyError(f"{head} is in codes; readers of awq keep the head dense")
        return {**config, "modules_to_not_convert": skipped}
    inner = [name for name in skipped if f"{name}.weight" != head]
    others = {f"-:^{name.replace('.', '[.]')}$": {} for name in inner}
    return {**config, "lm_head": head in coded, **({"dynamic": others} if others else {})}
