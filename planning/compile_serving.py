"""The serving engine's step compiled for a TPU slice that is not there: as `planning.compile_ahead`
for training.

    plan = compile_serving(config, parse_topology("v5e:2x2"), Serving("decode", batch=64))

What is compiled is `serving.step.run_step` in the shapes that an engine would warm up, with pages,
the tokens of all slots and the sampler.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas.tpu_topology import without_cache
from model import ModelConfig, Runtime, abstract, count_parameters, rules
from model.caches.paged import page_axes
from model.parameters import describe
from planning.compile_ahead import (
    Topology,
    bytes_on_a_device,
    compiled_with_text,
    described_devices,
    memory_named,
    network_seconds,
)
from planning.hlo import Collective, collectives
from planning.operators import Bits, Work, operators, total_flops
from planning.operators import decode as decode_work
from planning.roofline import seconds, timed
from serving.memory import Model, make_state
from serving.sampling import Variant
from serving.settings import EngineSettings, Resolved, resolve_settings
from serving.shapes import Shapes, choose_shapes
from serving.step import State, Step, mask_shape, run_step
from sharding import Layout, check_heads, make_layout, make_mesh, partition
from training import RunConfig
from weights import grouped, int8, map_with_path, nearest, prepare

KINDS = ("prefill", "decode")
PACKED: dict[str, tuple[Callable[[jax.Array], Any] | None, float]] = {
    "bfloat16": (None, 16),
    "int8": (int8.quantize, 8),
    "int4": (functools.partial(grouped.quantize, bits=4, group=128), 4.25),
}
"""Name -> how a layer's matrix is packed, and bits of one of its values with their scales."""


@dataclass(frozen=True)
class Serving:
    """What a step does, and for whom the cache has room.

    what: "prefill", a step of `chunk` tokens of prompts, or "decode", one token for each sequence.
    batch: sequences at once, each of at most `context` tokens. weights: a name of `PACKED`, for the
    layers' matrices; embeddings, head and norms stay bfloat16.
    """

    what: str = "decode"
    batch: int = 8
    context: int = 2048
    chunk: int = 2048
    weights: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, known in (("what", KINDS), ("weights", tuple(PACKED))):
            if (value := getattr(self, name)) not in known:
                near = nearest(str(value), known) or ", ".join(known)
                raise ValueError(f"{name}={value!r}: no such one; nearest: {near}")
        for name in ("batch", "context", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; at least 1")

    @property
    def work(self) -> Work:
        """As the operator table counts it: prompts of a prefill are as long as they may be."""
        if self.what == "decode":
            return decode_work(self.batch, self.context)
        query = min(self.chunk, self.context)
        return Work(max(self.chunk // query, 1), query, query)


@dataclass(frozen=True)
class ServingPlan:
    """What a compiled step of the engine takes; bytes and seconds are of one device.

    parameters, cache, slots: bytes of the weights, of the pages, and of tokens and settings of the
    sequences. temporaries: bytes beside them. tokens: that the step computes. flops: of the step on
    all devices. roofline_seconds: operators one after another, each bound by the matrix unit or by
    memory. network_seconds: collectives one after another.
    """

    topology: Topology
    devices: int
    mesh: dict[str, int]
    serving: Serving
    parameter_count: int
    tokens: int
    parameters: float
    cache: float
    slots: float
    temporaries: float
    limit: float
    flops: float
    roofline_seconds: float
    network_seconds: float
    collectives: tuple[Collective, ...]
    compile_seconds: float

    @property
    def memory(self) -> float:
        """Bytes at the peak."""
        return self.parameters + self.cache + self.slots + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether that is within the device's memory."""
        return self.memory <= self.limit

    @property
    def seconds(self) -> float:
        """Of a step in which nothing overlaps."""
        return self.roofline_seconds + self.network_seconds

    @property
    def limited_by(self) -> str:
        """What to look at first."""
        if not self.fits:
            return "memory"
        if self.network_seconds > self.roofline_seconds:
            return "network"
        peak = self.topology.device(self.devices).bf16_flops * self.devices
        computing = self.flops / peak > self.roofline_seconds / 2
        return "compute" if computing else "memory bandwidth"

    def figures(self) -> dict[str, Any]:
        """All fields, and what follows from them, for JSON."""
        return {
            **dataclasses.asdict(self),
            "memory": self.memory,
            "fits": self.fits,
            "seconds": self.seconds,
            "limited_by": self.limited_by,
        }


def compile_serving(config: RunConfig, topology: Topology, serving: Serving) -> ServingPlan:
    """Compile the engine's step of a config's model for a topology; its mesh is `config.mesh`.

    Raises `ValueError` for meshes, heads or contexts that do not fit, as an engine would, and for
    too little memory, with both amounts.
    """
    if config.model is None:
        raise ValueError("config.model is needed to plan a server")
    model = config.model.resolve()
    if serving.weights != "bfloat16" and _is_mixture(model):
        raise ValueError(
            f"weights={serving.weights!r}: a mixture's experts are planned in bfloat16"
        )
    mesh = make_mesh(config.mesh, described_devices(topology))
    layout = check_heads(
        make_layout(mesh, config.sharding), model.num_heads, model.kv_heads or model.num_heads
    )
    settings = _settings(serving)
    resolved = resolve_settings(settings, model, "tpu")
    shapes = choose_shapes(settings, resolved, "tpu", model.vocab_size)
    step, variant = _shape(shapes, serving)
    began = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), without_cache(), memory_named():
        params = abstract_params(model, layout, serving.weights)
        runtime = Runtime(compute_dtype=resolved.compute_dtype, layout=layout)
        state = _abstract_state(Model(params, model, runtime), settings, resolved, layout)
        mask = jax.ShapeDtypeStruct(mask_shape(step, model.vocab_size), jnp.uint32)
        arrays = (params, state, *_replicated((step, mask), mesh))
        options = {"config": model, "runtime": runtime, "variant": variant}
        compiled = compiled_with_text(run_step.lower(*arrays, **options))
    return _plan(model, topology, serving, (params, state, step), layout, compiled, began)


def abstract_params(model: ModelConfig, layout: Layout, weights: str) -> Mapping[str, Any]:
    """Shapes and places of a model's weights as an engine holds them on a TPU."""
    pack, _ = PACKED[weights]

    def packed(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        if pack is None or not path.endswith("/kernel") or leaf.ndim != 3:
            return leaf
        try:
            return jax.eval_shape(jax.vmap(pack), leaf)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    params = map_with_path(packed, abstract(model, jnp.bfloat16))
    ready = jax.eval_shape(
        lambda tree: map_with_path(lambda _, weight: prepare(weight, "tpu"), tree), params
    )
    return _placed(ready, partition(ready, rules(model), layout))


def _is_mixture(model: ModelConfig) -> bool:
    return any("experts" in spec.axes for spec, _ in describe(model).values())


def _settings(serving: Serving) -> EngineSettings:
    """An engine with room for the batch, and one size of each kind of step."""
    base = EngineSettings(
        max_model_len=serving.context,
        max_num_seqs=serving.batch,
        max_num_batched_tokens=max(serving.chunk, serving.batch),
        decode_sizes=(serving.batch,),
        chunk_sizes=(serving.chunk,),
    )
    page_size = 128
    pages = serving.batch * -(-serving.context // page_size)
    return dataclasses.replace(base, page_size=page_size, num_pages=pages)


def _shape(shapes: Shapes, serving: Serving) -> tuple[Step, Variant]:
    """The program of a step of this kind that gives all that a request may ask for."""
    decodes = serving.what == "decode"
    wanted = (decodes, serving.batch if decodes else serving.chunk)
    return [each for each in shapes.all() if (each[0].decodes, each[0].tokens) == wanted][-1]


def _abstract_state(
    model: Model, settings: EngineSettings, resolved: Resolved, layout: Layout
) -> State:
    """Shapes and places of what the engine keeps: pages split by heads, the rest everywhere."""
    one_device = dataclasses.replace(model, runtime=Runtime(model.runtime.compute_dtype))
    assert settings.num_pages is not None
    pages = settings.num_pages
    state = jax.eval_shape(
        lambda params: make_state(params, one_device, resolved, pages, settings.room), model.params
    )

    def page(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = layout.sharding(page_axes(leaf.shape[3] // 2, layout))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    segments = jax.tree.map(page, state.cache.segments)
    state = _replicated(state, layout.mesh)
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, segments=segments))


def _replicated(tree: Any, mesh: Mesh) -> Any:
    whole = jax.sharding.NamedSharding(mesh, PartitionSpec())
    return _placed(tree, jax.tree.map(lambda _: whole, tree))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _plan(
    model: ModelConfig,
    topology: Topology,
    serving: Serving,
    given: tuple[Any, State, Step],
    layout: Layout,
    compiled: tuple[Any, str],
    began: float,
) -> ServingPlan:
    compile_seconds = time.monotonic() - began
    (params, state, step), mesh = given, dict(layout.mesh.shape)
    found = tuple(collectives(compiled[1], mesh))
    bits = Bits(weights=PACKED[serving.weights][1])
    ops = operators(model, serving.work, bits, mesh["tensor"])
    cache, hardware = bytes_on_a_device(state.cache.segments), topology.device(layout.mesh.size)
    return ServingPlan(
        topology=topology,
        devices=layout.mesh.size,
        mesh=mesh,
        serving=serving,
        parameter_count=count_parameters(model),
        tokens=step.tokens,
        parameters=bytes_on_a_device(params),
        cache=cache,
        slots=bytes_on_a_device(state) - cache,
        temporaries=compiled[0].memory_analysis().temp_size_in_bytes,
        limit=hardware.memory_bytes,
        flops=total_flops(operators(model, serving.work)),
        roofline_seconds=seconds(timed(ops, hardware)),
        network_seconds=sum(network_seconds(found, hardware)),
        collectives=found,
        compile_seconds=compile_seconds,
    )
