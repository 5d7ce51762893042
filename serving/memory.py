"""How many pages of keys and values fit: asked before anything is allocated, so that an engine that
cannot hold one sequence of the length it promises says so at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from model import ModelConfig, Runtime
from model.caches import init_paged_cache
from model.segments import segments_of
from serving.sampling_settings import Room
from serving.settings import EngineSettings, Resolved
from serving.shapes import Shapes
from serving.step import State, init_state, mask_shape, run_step

GIB = 1 << 30


@dataclass(frozen=True)
class Model:
    """A model as an engine runs it; params may be abstract."""

    params: Mapping[str, Any]
    config: ModelConfig
    runtime: Runtime


def page_bytes(model: Model, resolved: Resolved) -> int:
    """Bytes that one page takes on a device, all layers together."""
    cache = jax.eval_shape(
        lambda: init_paged_cache(
            model.config,
            1,
            resolved.page_size,
            planned_length=resolved.max_model_len,
            dtype=resolved.kv_dtype,
            segments=segments_of(model.params, model.config),
        )
    )
    layout = model.runtime.layout
    pieces = 1 if layout is None else layout.size("kv_heads")
    total = 0
    for leaf in jax.tree.leaves(cache.segments):
        # Heads that do not divide are whole on every device.
        split = pieces if leaf.shape[3] // 2 % pieces == 0 else 1
        total += leaf.size * leaf.dtype.itemsize // split
    return total


def choose_pages(
    settings: EngineSettings, resolved: Resolved, model: Model, shapes: Shapes, device: Any
) -> int:
    """How many pages the engine has.

    `num_pages` if given; on a CPU what `kv_cache_bytes` hold; elsewhere what is left of
    `memory_fraction` of the device after what lies there already, the largest step's temporaries
    and the state beside the pages. Raises `ValueError` if one sequence of `max_model_len` tokens
    would not fit, with the length that would.
    """
    each = page_bytes(model, resolved)
    if settings.num_pages is not None:
        pages, source = settings.num_pages, "num_pages"
    elif device.platform == "cpu":
        pages, source = settings.kv_cache_bytes // each, "kv_cache_bytes"
    else:
        used = beside_pages(model, resolved, shapes, settings.room)
        pages, source = free_bytes(device, settings.memory_fraction, used) // each, "memory"
    if pages < resolved.pages_per_sequence:
        raise ValueError(_too_few(pages, each, resolved, source))
    return pages


def free_bytes(device: Any, fraction: float, used: int) -> int:
    """What an engine may fill of a device's memory once `used` more bytes are taken."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ValueError(f"{device.device_kind} does not say how much memory it has; set num_pages")
    free = int(stats["bytes_limit"] * fraction) - stats["bytes_in_use"] - used
    return max(free, 0)


def beside_pages(model: Model, resolved: Resolved, shapes: Shapes, room: Room) -> int:
    """Bytes of the largest step's temporaries and of the state without pages; compiles the step."""
    state = jax.eval_shape(
        lambda params: make_state(params, model, resolved, 1, room), model.params
    )
    step, variant = shapes.largest()
    mask = jax.ShapeDtypeStruct(mask_shape(step, model.config.vocab_size), "uint32")
    options = {"config": model.config, "runtime": model.runtime, "variant": variant}
    compiled = run_step.lower(model.params, state, step, mask, **options).compile()
    memory: Any = compiled.memory_analysis()
    leaves = jax.tree.leaves((state.tokens, state.seen, state.settings))
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return memory.temp_size_in_bytes + kept


def make_state(params: Any, model: Model, resolved: Resolved, pages: int, room: Room) -> State:
    """The state of an engine with so many pages."""
    state = init_state(
        params,
        model.config,
        model.runtime,
        slots=resolved.slots,
        max_length=resolved.max_model_len,
        pages=pages,
        page_size=resolved.page_size,
        dtype=resolved.kv_dtype,
        room=room,
    )
    if model.runtime.layout is not None:
        return state
    # Committed to its device, as each step's result is, or every program would be compiled twice.
    return jax.device_put(state, jax.local_devices()[0])


def _too_few(pages: int, each: int, resolved: Resolved, source: str) -> str:
    needed, longest = resolved.pages_per_sequence, pages * resolved.page_size
    remedy = "more memory is needed" if not pages else f"set max_model_len to {longest} or less"
    more = {"memory": "give more devices or raise memory_fraction"}.get(source, f"raise {source}")
    return (
        f"a sequence of max_model_len {resolved.max_model_len} tokens needs {needed} pages, "
        f"{needed * each / GIB:.3g} GiB of keys and values; {source} leaves {pages} pages, "
        f"{pages * each / GIB:.3g} GiB: {remedy}, or {more}"
    )
