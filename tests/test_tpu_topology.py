"""Compiling for TPUs that are not there: figures, kernels alone and inside `shard_map`."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from tpu_aot import REASON, compile_and_fit, on_every_generation

from benchmarks import kernels_tpu
from benchmarks.kernel_case import Rival
from benchmarks.kernel_cases import quantized
from kernels_pallas.target import current_target, warn_once
from kernels_pallas.tpu_topology import (
    GENERATIONS,
    compile_for,
    described_mesh,
    generation_of,
)


def _double(x):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    block = pl.BlockSpec((256, 512), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0] // 256,),
        in_specs=[block],
        out_specs=block,
        cost_estimate=pl.CostEstimate(flops=10**9, bytes_accessed=10**6, transcendentals=0),
    )(x)


@on_every_generation
def test_a_kernel_is_compiled_and_its_vector_memory_is_two_buffers_of_each_block(generation):
    rows = 65536  # too many for the compiler to keep the arrays themselves in vector memory
    x = jax.ShapeDtypeStruct((rows, 512), jnp.float32)
    compiled = compile_and_fit(_double, (x,), generation, kernels=1)
    assert compiled.vmem_bytes == (4 * 256 * 512 * 4,)
    assert compiled.argument_bytes == compiled.output_bytes == rows * 512 * 4
    assert compiled.flops == pytest.approx(1e9, rel=1e-3)
    assert compiled.seconds is not None
    assert compiled.seconds > 0


@on_every_generation
def test_a_kernel_is_compiled_inside_shard_map(generation):
    mesh = described_mesh(generation, {"data": 2, "tensor": 2})
    spec = PartitionSpec(("data", "tensor"))
    x = jax.ShapeDtypeStruct((2048, 512), jnp.float32)
    split = functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    compiled = compile_and_fit(
        split(_double, check_vma=False), (x,), generation, kernels=1, mesh=mesh, specs=(spec,)
    )
    assert compiled.argument_bytes == 512 * 512 * 4


@pytest.mark.parametrize("name", GENERATIONS)
def test_figures_agree_with_those_of_jax(name):
    figures = GENERATIONS[name]
    chip = pltpu.ChipVersion(name)
    known = pltpu.get_tpu_info_for_chip(chip, figures.cores)
    assert figures.vmem_bytes == known.vmem_capacity_bytes
    assert figures.matrix_unit == known.mxu_column_size
    for mine, theirs in (
        (figures.hbm_bytes, known.hbm_capacity_bytes),
        (figures.hbm_bandwidth, known.mem_bw_bytes_per_second),
        (figures.bfloat16, known.bf16_ops_per_second),
        (figures.int8, known.int8_ops_per_second),
        (figures.int4, known.int4_ops_per_second),
        (figures.float8, known.fp8_ops_per_second),
    ):
        assert mine == pytest.approx(theirs, rel=0.01)
    assert generation_of(figures.device_kind) == name


def test_a_mesh_larger_than_the_topology_is_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="takes 64 devices; v5e:2x2 describes 4"):
        described_mesh("v5e", {"data": 64})


def test_the_target_is_the_described_device_or_the_default_one():
    assert current_target().platform == "cpu"
    with jax.default_device(jax.devices()[3]):
        assert current_target().platform == "cpu"


@on_every_generation
def test_the_target_is_a_tpu_inside_its_mesh(generation):
    seen = []
    function = lambda x: seen.append(current_target()) or x  # noqa: E731
    compile_for(function, (jax.ShapeDtypeStruct((8, 128), jnp.float32),), generation)
    assert {(target.platform, target.generation) for target in seen} == {("tpu", generation)}


def test_a_reason_is_warned_of_once():
    with pytest.warns(UserWarning, match="fast product: the plain function .* no such type"):
        warn_once("fast product", "no such type")
    warn_once("fast product", "no such type")


@pytest.mark.tpu_aot
@pytest.mark.skipif(REASON is not None, reason=REASON or "libtpu compiles here")
def test_the_benchmark_has_a_row_a_program_and_says_what_does_not_compile(capsys):
    case = quantized.packed("llama3_8b_query_int4")
    too_much = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)
    greedy = Rival("greedy", lambda x: x @ x, (too_much,))
    rows = list(kernels_tpu.compiled_rows(dataclasses.replace(case, library=greedy), ["v5e"], None))
    kernels_tpu.show("", rows, ["v5e"], kernels_tpu.traffic, markdown=True)
    assert not kernels_tpu.report(rows)  # the kernel itself compiles
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert re.match(
        r"\| quantized, llama3_8b_query_int4 \| 0.5 \| 9.7 \| [\d.]+ · 0.0 · \d+ \|", lines[2]
    )
    assert lines[3] == "| - greedy |  |  | does not compile |"
    assert lines[4].startswith("| - XLA, int4 |")
    assert "greedy on v5e: JaxRuntimeError: RESOURCE_EXHAUSTED" in said.err
    assert kernels_tpu.roofline(case, "v5e") == "12m"
