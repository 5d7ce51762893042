"""The TPU kernels of decoding compiled for every generation, without a TPU: within their memory,
inside `shard_map`, and with no copy of a cache around them.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from tpu_aot import compile_and_fit, on_every_generation

from benchmarks.kernel_cases import decode as cases
from kernels_pallas.decode_attention import Unified, decode_attention
from kernels_pallas.kv_quant import KiviPages, quantized_attention
from kernels_pallas.paged_attention import append, paged_attention
from kernels_pallas.tpu_topology import described_mesh

pytestmark = pytest.mark.slow


def fits(case, generation, kernels):
    """It compiles, and what it accesses is what its cost says: a copied layer would show."""
    compiled = compile_and_fit(case.function, case.shapes, generation, kernels=kernels)
    assert compiled.bytes_accessed == pytest.approx(case.bytes, rel=0.2)
    assert compiled.temp_bytes < 0.1 * compiled.argument_bytes


@on_every_generation
def test_decoding_reads_its_cache_once(generation):
    fits(cases.decode("llama3_8b"), generation, 1)


@on_every_generation
@pytest.mark.parametrize("bits", [8, 2])
def test_decoding_reads_quantized_pages_once(generation, bits):
    fits(cases.quantized(f"llama3_8b_{bits}bit"), generation, 1)


@on_every_generation
def test_a_decoding_step_reads_its_pages_once(generation):
    fits(cases.paged("llama3_8b_decode"), generation, 1)


@on_every_generation
def test_everything_at_once_compiles_inside_shard_map(generation):
    """Heads over two devices, sequences over two more."""
    mesh = described_mesh(generation, {"data": 2, "tensor": 2})
    q, k, v = P("data", None, "tensor"), P(None, "data", "tensor"), P(None, "data", "tensor")
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    shapes = (array((8, 3, 16, 128)), *[array((2, 8, 4, 2048, 128))] * 2, cases.whole(8))
    specs = (q, k, v, P("data"))

    def run(q, k, v, lengths):
        heads = jnp.arange(q.shape[2], dtype=jnp.float32)
        return decode_attention(
            q, k, v, lengths, layer=1, window=300, sinks=4, soft_cap=30.0, alibi_slopes=heads,
            softmax=Unified(heads), return_lse=True,
        )  # fmt: skip

    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(q, q), check_vma=False)
    compiled = compile_and_fit(split, shapes, generation, kernels=1, mesh=mesh, specs=specs)
    assert "all-gather" not in compiled.text


@on_every_generation
def test_pages_of_both_kinds_are_attended_to_inside_shard_map(generation):
    """Heads over two devices: a step stores its tokens, and decodes beside 2-bit pages."""
    mesh = described_mesh(generation, {"tensor": 2})
    heads, rows = P(None, "tensor"), P(None, None, None, "tensor")
    kivi = jax.eval_shape(lambda: KiviPages.empty(2, 16, 4, 128, 128))
    pages = cases.array(2, 64, 16, 8, 128)
    table, lengths, starts = cases.whole(4, 16), cases.whole(4), cases.whole(5)
    shapes = (cases.array(4, 16, 128), pages, kivi, table, lengths, starts)
    specs = (heads, rows, P(None, None, "tensor"), P(), P(), P())

    def run(q, pages, kivi, table, lengths, starts):
        pages = append(q[:, ::4], q[:, ::4], pages, lengths, layer=1)
        step = paged_attention(q, pages, table, lengths, starts, layer=1, max_query_length=1)
        return step, quantized_attention(q[:, None], kivi, table[:, :4], lengths)[:, 0]

    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    compiled = compile_and_fit(split, shapes, generation, kernels=3, mesh=mesh, specs=specs)
    assert "all-gather" not in compiled.text


@on_every_generation
def test_a_mixed_step_appends_in_place_and_attends_under_a_scan_over_layers(generation):
    """The pages ride in the carry; a second copy of them would show in the memory. All heads for
    the smallest vector memory; else those of one device of four, which compile sooner.
    """
    _, (q, pages, *numbers), _, _ = cases.step_of("llama3_8b_mixed")
    if generation != "v4":
        q, pages = (x.update(shape=(*x.shape[:-2], x.shape[-2] // 4, 128)) for x in (q, pages))
    slots = cases.whole(q.shape[0])

    def run(q, pages, table, lens, starts, slots):
        def layer(carry, number):
            q, pages = carry
            k = q[:, ::4]
            pages = append(k, k, pages, slots, layer=number)
            q = paged_attention(q, pages, table, lens, starts, layer=number)
            return (q, pages), None

        (q, pages), _ = jax.lax.scan(layer, (q, pages), jnp.arange(2))
        return q, pages[0, 0, 0, 0, 0]

    compiled = compile_and_fit(run, (q, pages, *numbers, slots), generation, kernels=3)
    size = pages.size * 2
    assert compiled.temp_bytes < 1.2 * size, (compiled.temp_bytes, size)
