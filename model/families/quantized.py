"""Hugging Face folders whose linear layers are quantized: GPTQ, AWQ and bitsandbytes.

`quantization_config` of `config.json` is understood here and nowhere else. A quantized layer lies
in several tensors (`NAME.qweight`, `NAME.scales`, …); `modules` finds them, and `logical` shows
each layer as the one dense `NAME.weight` that it stands for, so that names and shapes are checked
as those of any folder. `weights.interop` knows the tensors of one layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from model.families.keys import FamilyError
from model.families.plan import Source
from model.families.reader import TensorInfo, WeightFiles
from weights import ActQuant, Int8, Outlier, nearest, stack
from weights.interop import LayoutError, awq, bitsandbytes, gptq
from weights.interop.columns import alike, take_columns

KEY = "quantization_config"

_GPTQ_INERT = """
    desc_act sym lm_head true_sequential damp_percent damp_auto_increment static_groups mse
    act_group_aware tokenizer dataset meta backend model_seqlen block_name_to_quantize
    module_name_preceding_first_block batch_size pad_token_id max_input_length cache_block_outputs
    modules_in_block_to_quantize use_cuda_fp16 use_exllama disable_exllama exllama_config
    model_name_or_path model_file_base_name offload_to_disk offload_to_disk_path
"""
_AWQ_INERT = """
    zero_point modules_to_not_convert do_fuse modules_to_fuse fuse_max_seq_len
"""
_BITSANDBYTES_INERT = """
    _load_in_4bit _load_in_8bit llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload
    bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype bnb_4bit_quant_storage
"""

INERT = {
    "gptq": frozenset(_GPTQ_INERT.split()),
    "awq": frozenset((_GPTQ_INERT + _AWQ_INERT).split()),
    "bitsandbytes": frozenset(_BITSANDBYTES_INERT.split()),
}
"""Keys that change no number of what is in the files: how codes were found, which kernel runs, and
what each layer's own tensors say as well.
"""

READ = {
    "gptq": ("bits", "group_size", "checkpoint_format", "format", "dynamic"),
    "awq": ("bits", "group_size", "version", "format"),
    "bitsandbytes": ("load_in_4bit", "load_in_8bit", "llm_int8_threshold"),
}
"""Keys that numbers depend on."""

FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {"is_marlin_format": (False,), "pack_dtype": ("int32",)},
    "awq": {"backend": ("auto", "autoawq")},
    "bitsandbytes": {"llm_int8_has_fp16_weight": (False,)},
}
"""Keys of which only these values are read."""

ARRAYS = {
    "gptq": (gptq.NAMES, ("g_idx",)),
    "awq": (awq.NAMES, ()),
    "bitsandbytes 8": (("weight", "SCB"), ("weight_format",)),
    "bitsandbytes 4": (
        ("weight", "weight.absmax", "weight.quant_map"),
        (*bitsandbytes.NESTED, *(bitsandbytes.STATE + kind for kind in bitsandbytes.KINDS)),
    ),
}
"""Last names of a layer's tensors: those that there must be, and those that there may be."""


@dataclass(frozen=True)
class Settings:
    """A `quantization_config` that was understood.

    method: gptq, awq or bitsandbytes.
    values: its keys that numbers depend on.
    """

    method: str
    values: Mapping[str, Any]

    @property
    def layout(self) -> str:
        """The name in `ARRAYS`."""
        if self.method != "bitsandbytes":
            return self.method
        return "bitsandbytes 8" if self.values.get("load_in_8bit") else "bitsandbytes 4"


@dataclass(frozen=True)
class Module:
    """A quantized layer in the files.

    name: `model.layers.0.self_attn.q_proj`.
    arrays: `{last name: name in the files}`.
    info: the dense `NAME.weight` that it stands for, `[out, in]`.
    """

    name: str
    arrays: Mapping[str, str]
    info: TensorInfo


def split_config(
    values: Mapping[str, Any], ignore: Iterable[str] = ()
) -> tuple[dict[str, Any], Settings | None]:
    """A `config.json` without its `quantization_config`, and that; None where the model is dense.

    `ignore` may hold `quantization_config.KEY`. Raises `FamilyError` for a method, key or value
    that is not read.
    """
    rest = dict(values)
    found = rest.pop(KEY, None)
    if found is None:
        return rest, None
    if not isinstance(found, dict):
        raise FamilyError(f"{KEY} is {found!r}, not an object")
    loads = found.get("load_in_4bit") or found.get("load_in_8bit")
    method = found.get("quant_method", "bitsandbytes" if loads else None)
    if method not in READ:
        raise FamilyError(f"{KEY}.quant_method is {method!r}; read are {', '.join(READ)}")
    ignored = {name.removeprefix(f"{KEY}.") for name in ignore if name.startswith(f"{KEY}.")}
    _check_keys(method, {k: v for k, v in found.items() if k not in ignored})
    kept = {name: found[name] for name in READ[method] if found.get(name) is not None}
    return rest, Settings(method, _one_spelling(method, kept))


def _check_keys(method: str, found: Mapping[str, Any]) -> None:
    known = {"quant_method", *READ[method], *INERT[method], *FIXED[method]}
    for name, value in found.items():
        if value is None:
            continue
        if name not in known:
            raise FamilyError(
                f"{KEY}.{name} = {value!r} is not known for {method} and may change numbers "
                f"(nearest: {nearest(name, known) or 'none'}); if it does not, name "
                f"{KEY}.{name} in ignore_keys"
            )
        allowed = FIXED[method].get(name, (value,))
        if value not in allowed:
            raise FamilyError(
                f"{KEY}.{name} is {value!r}; read is {' or '.join(map(repr, allowed))}"
            )


def _one_spelling(method: str, kept: dict[str, Any]) -> dict[str, Any]:
    """The values with one name each; layers that were left out show in the files."""
    for pattern in kept.pop("dynamic", {}):
        if not pattern.startswith("-:"):
            raise FamilyError(
                f"{KEY}.dynamic has {pattern!r}: layers with settings of their own are not read, "
                "only those that are left out ('-:…')"
            )
    if method == "bitsandbytes":
        if bool(kept.get("load_in_4bit")) == bool(kept.get("load_in_8bit")):
            raise FamilyError(f"{KEY}: exactly one of load_in_4bit and load_in_8bit must be true")
        return kept
    name = {"gptq": "checkpoint_format", "awq": "version"}[method]
    other = kept.pop("format", None)
    if other is not None and str(kept.setdefault(name, other)).lower() != str(other).lower():
        raise FamilyError(f"{KEY}.format is {other!r}, and {name} is {kept[name]!r}")
    known = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}[method]
    version = str(kept.setdefault(name, known[0])).lower()
    bits = {"gptq": gptq.BITS, "awq": (awq.BITS,)}[method]
    for key, value, allowed in ((name, version, known), ("bits", kept.get("bits"), bits)):
        if value not in allowed:
            shown = ", ".join(map(repr, allowed))
            raise FamilyError(f"{KEY}.{key} is {kept.get(key)!r}; read is {shown}")
    kept.setdefault("group_size", 128)  # what an absent key means to transformers
    return {**kept, name: version}


def modules(files: WeightFiles, settings: Settings) -> dict[str, Module]:
    """`{NAME.weight: module}` of every quantized layer in the files.

    Raises `FamilyError` naming tensors that are missing or of a type that is none of theirs.
    """
    needed, optional = ARRAYS[settings.layout]
    own = [name for name in (*needed, *optional) if name != "weight"]
    names = {
        tensor.removesuffix(f".{last}")
        for tensor in files.tensors
        for last in own
        if tensor.endswith(f".{last}")
    }
    names |= {
        tensor.removesuffix(".weight")
        for tensor, info in files.tensors.items()
        if settings.method == "bitsandbytes"
        and tensor.endswith(".weight")
        and info.dtype.kind in "iu"
    }
    if not names:
        raise FamilyError(
            f"{files.folder}: its config.json says {settings.method}, but no layer is quantized: "
            f"no tensor ends in {' or '.join(f'.{name}' for name in own[:2])}"
        )
    known = [*needed, *optional]
    found, missing = {}, []
    for name in sorted(names):
        arrays = {last: f"{name}.{last}" for last in known if f"{name}.{last}" in files.tensors}
        state = settings.layout != "bitsandbytes 4" or _state(arrays)
        missing += [f"{name}.{last}" for last in needed if last not in arrays]
        missing += [] if state else [f"{name}.{bitsandbytes.STATE}nf4 (or fp4)"]
        if not missing:
            found[f"{name}.weight"] = Module(name, arrays, _dense(files, settings, name, arrays))
    if missing:
        raise FamilyError(
            f"{files.folder}: quantized layers lack tensors ({len(missing)}): "
            f"{'; '.join(missing[:10])}"
        )
    return found


def _state(arrays: Mapping[str, str]) -> str | None:
    """The tensor with the settings of a layer of 4 bits."""
    return next((arrays[last] for last in arrays if last.startswith(bitsandbytes.STATE)), None)


def _dense(
    files: WeightFiles, settings: Settings, name: str, arrays: Mapping[str, str]
) -> TensorInfo:
    """What a layer stands for, `[out, in]`, in the file of its codes."""
    info = files.tensors[arrays["qweight" if "qweight" in arrays else "weight"]]
    if len(info.shape) != 2:
        raise FamilyError(f"{info.file}: {name} has codes {list(info.shape)}; two axes are read")
    if settings.method == "gptq":
        shape = (info.shape[1], info.shape[0] * 32 // settings.values["bits"])
    elif settings.method == "awq":
        shape = (info.shape[1] * 32 // awq.BITS, info.shape[0])
    elif state := _state(arrays):
        try:
            rows, columns = json.loads(files.read(state).tobytes())["shape"]
        except (ValueError, KeyError, TypeError) as error:
            raise FamilyError(f"{info.file}: {state} is no JSON with a shape ({error})") from None
        shape = (rows, columns)
    else:
        shape = info.shape
    return replace(info, shape=shape, dtype=np.dtype(np.float32))


def logical(
    files: WeightFiles, found: Mapping[str, Module], wanted: Iterable[str], prefix: str
) -> dict[str, TensorInfo]:
    """The tensors of a folder, each quantized layer as the dense `NAME.weight` it stands for.

    `wanted` are the names that the model has. A bias that it has none of, as old files hold for
    every layer, is passed over if it is 0.
    """
    hidden = {name for module in found.values() for name in module.arrays.values()}
    shown = {name: info for name, info in files.tensors.items() if name not in hidden}
    wanted = set(wanted)
    for module in found.values():
        bias = f"{module.name}.bias"
        expected = bias in wanted or prefix + bias in wanted
        if bias in shown and not expected and not files.read(bias).any():
            del shown[bias]
    return {**shown, **{name: module.info for name, module in found.items()}}


def check_linear(source: Source, name: str) -> None:
    """Raise `FamilyError` unless an array is a plain linear layer, the only kind that is read and
    written in codes.
    """
    if source.tensor.transposed and len(source.whole) == 2 and source.path.endswith("/kernel"):
        return
    raise FamilyError(
        f"{name} is quantized, but {source.path} is no plain linear layer; embeddings, experts and "
        "Conv1D layers are read and written dense only"
    )


def layers_of(source: Source, found: Iterable[str], coded: Mapping[str, Module]) -> list[Module]:
    """The quantized layers that an array lies in, given its names in the files; none if it is
    dense. Raises `FamilyError` for a stack that is quantized in part.
    """
    found = list(found)
    dense = [name for name in found if name not in coded]
    layers = [coded[name] for name in found if name in coded]
    if layers:
        check_linear(source, layers[0].name)
    if dense and layers:
        raise FamilyError(
            f"{source.path}: {dense[0]} is dense and {layers[0].name} is quantized; the layers of "
            "one stack must be alike"
        )
    return layers


def read_layers(
    files: WeightFiles, settings: Settings, source: Source, layers: Iterable[Module]
) -> Any:
    """One of our arrays, all its layers, as a weight format on the host.

    Raises `FamilyError` naming file and layer for tensors that do not fit together.
    """
    with _on_host():
        found = [_read(files, settings, source, module) for module in layers]
        if source.segment is None:
            return found[0]
        try:
            return stack(alike(found))
        except ValueError as error:
            raise FamilyError(f"{source.path} ({source.tensor.theirs}): {error}") from None


def _read(files: WeightFiles, settings: Settings, source: Source, module: Module) -> Any:
    check_linear(source, module.name)
    arrays = {last: files.read(name) for last, name in module.arrays.items()}
    read = {"gptq": gptq.read, "awq": awq.read, "bitsandbytes": bitsandbytes.read}
    if settings.layout == "bitsandbytes 4":  # the bytes of the codes may be stored as another type
        arrays["weight"] = np.ascontiguousarray(arrays["weight"]).view(np.uint8)
    try:
        weight = read[settings.method](arrays, settings.values)
        weight = weight if source.rows is None else take_columns(weight, source.rows)
    except LayoutError as error:
        raise FamilyError(f"{module.info.file}: {module.name}: {error}") from error
    return _with_inputs(weight, settings) if isinstance(weight, Int8) else weight


def _with_inputs(weight: Int8, settings: Settings) -> Int8:
    """LLM.int8(): inputs in 8 bits too, but for those that reach the threshold."""
    threshold = float(settings.values.get("llm_int8_threshold", 6.0))
    outlier = None
    if threshold > 0:
        outlier = Outlier(threshold=threshold, capacity=max(1, weight.shape[0] // 8))
    return replace(weight, act=ActQuant(), outlier=outlier)


def _on_host() -> Any:
    """Arrays are made in the host's memory, where JAX has a backend for it."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return jax.default_device(jax.local_devices()[0])
