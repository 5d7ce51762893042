"""The GPU kernels of decoding without a GPU: in the simulator of Hopper's barriers, copies and
slots against the plain functions, lowered for CUDA, and compiled to machine code where that is
possible.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_aot import compile_and_fit, on_a_described_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.kernel_cases import decode as cases
from kernels_pallas.decode_attention import Unified, decode_attention, gpu
from kernels_pallas.decode_attention.stream import Items
from kernels_pallas.decode_attention.work import dealt_items
from kernels_pallas.gpu_topology import GPUS, compile_for, described_mesh
from kernels_pallas.kv_quant import KiviPages
from kernels_pallas.kv_quant import gpu as quantized_gpu
from kernels_pallas.paged_attention import gpu as paged_gpu
from kernels_pallas.paged_attention import paged_attention
from kernels_pallas.target import Target

QUERIES, GROUP, SLOTS, DIM = 2, 3, 192, 64
SLOPES = np.linspace(0.1, 0.6, GROUP).astype(np.float32)
MASKS = {
    "sinks": {"window": 70, "sinks": 3, "soft_cap": 3.0, "alibi_slopes": SLOPES},
    "ring": {"rolling": True, "window": 150},
}


def dense(lengths, rng):
    """q, k, v and lengths in bfloat16; what a sequence does not use is NaN or infinite."""
    lengths = np.asarray(lengths)
    q = rng.normal(size=(len(lengths), QUERIES, GROUP, DIM))
    k, v = rng.normal(size=(2, 2, len(lengths), 1, SLOTS, DIM))
    unused = np.arange(SLOTS) >= np.minimum(lengths, SLOTS)[:, None]
    k = np.where(unused[None, :, None, :, None], np.nan, k)
    v = np.where(unused[None, :, None, :, None], np.inf, v)
    return *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), jnp.asarray(lengths, jnp.int32)


def close(found, expected):
    """Both round their weights to bfloat16, of other constants."""
    for x, y, atol in zip(found, expected, (2e-2, 1e-4), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=atol)


def simulated(function, *arrays, **options):
    """Jitted, which the simulator is faster with."""
    return jax.jit(functools.partial(function, simulate=True, **options))(*arrays)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "lengths", "splits"), [("sinks", [165], 2), ("ring", [0, 307], 1)]
)
def test_decoding_in_the_simulator_equals_the_plain_function(mask, lengths, splits):
    arrays = dense(lengths, np.random.default_rng(0))
    options = {**MASKS[mask], "layer": 1, "return_lse": True}
    found = simulated(gpu.decode_attention, *arrays, splits=splits, **options)
    close(found, decode_attention(*arrays, implementation="plain", **options))


@pytest.mark.slow
def test_a_row_out_of_range_of_the_constant_falls_back_in_the_simulator():
    """And is then what the running maximum gives; the other rows keep the constant."""
    arrays = dense([70], np.random.default_rng(1))
    softmax = Unified(jnp.asarray([0.0, 100.0, 0.0], jnp.float32))
    options = {"layer": 1, "return_lse": True, "softmax": softmax}
    found = simulated(gpu.decode_attention, *arrays, splits=1, **options)
    close(found, decode_attention(*arrays, **options))
    assert np.isfinite(np.asarray(found[1])).all()


@pytest.mark.slow
def test_a_mixed_step_in_the_simulator_equals_the_plain_function():
    """A first token, and in one tile of more than 64 rows the ends of two prompts."""
    rng, size, width = np.random.default_rng(2), 32, 3
    lens, now = np.asarray([1, 70, 9]), [1, 20, 3]
    table = rng.permutation(3 * width).reshape(3, width)
    pages = np.full((2, 3 * width, size, 2, DIM), np.nan)
    for s, length in enumerate(lens):
        for t in range(length):
            pages[:, table[s, t // size], t % size] = rng.normal(size=(2, 2, DIM))
    q = jnp.asarray(rng.normal(size=(24, GROUP, DIM)), jnp.bfloat16)
    numbers = (table, lens, np.concatenate([[0], np.cumsum(now)]))
    arrays = (jnp.asarray(pages, jnp.bfloat16), *(jnp.asarray(x, jnp.int32) for x in numbers))
    options = {"layer": 1, "return_lse": True}
    found = simulated(paged_gpu.paged_attention, q, *arrays, splits=1, **options)
    close(found, paged_attention(q, *arrays, **options))


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_parts_of_tiles_share_out_every_block_once(data):
    """And a part's items follow each other, whether tiles have one item each or several."""
    whole, splits = st.integers(0, 9), data.draw(st.sampled_from([1, 3]))
    tiles = data.draw(st.sampled_from([3, 5]))
    several = st.lists(st.integers(0, tiles - 1), min_size=5, max_size=5).map(sorted)
    tile = list(range(5)) if tiles == 5 else data.draw(several)
    count = data.draw(st.integers(0, len(tile)))
    sinks, blocks, first = ([data.draw(whole) for _ in tile] for _ in range(3))
    blocks = [max(a, b) for a, b in zip(sinks, blocks, strict=True)]
    number = np.arange(len(tile))
    given_items = dict.fromkeys(Items._fields, number) | {"tile": tile, "first": first}
    given_items |= {"sink_blocks": sinks, "blocks": blocks}
    items = Items(**{name: jnp.asarray(x, jnp.int32) for name, x in given_items.items()})
    dealt, starts = (jax.tree.map(np.asarray, x) for x in dealt_items(items, count, tiles, splits))
    read = []
    for part in range(tiles * splits):
        for i in range(starts[part], starts[part + 1]):
            assert dealt.tile[i] == part // splits
            own = range(dealt.sink_blocks[i], dealt.blocks[i])
            turns = [(0, t) for t in range(min(dealt.sink_blocks[i], dealt.blocks[i]))]
            turns += [(1, dealt.first[i] + t - dealt.sink_blocks[i]) for t in own]
            read += [(dealt.sequence[i], *turn) for turn in turns]
    wanted = []
    for i in range(count):
        wanted += [(i, 0, t) for t in range(sinks[i])]
        wanted += [(i, 1, first[i] + t) for t in range(blocks[i] - sinks[i])]
    assert sorted(read) == sorted(wanted)


@pytest.mark.parametrize("blocks", [1, 8, 64, 512, 1000])
def test_splits_leave_no_more_processors_idle_than_none(blocks):
    target = Target("gpu", GPUS["h200"].device_kind, None)
    splits = gpu.splits_for(target, blocks, 64)
    waves = lambda n: -(-blocks * n // 132) / n  # noqa: E731
    assert 1 <= splits <= 16
    assert waves(splits) <= waves(1)
    assert blocks * splits >= min(100, blocks * 16)


def on(name):
    """A GPU of `GPUS` that is traced for."""
    return Target("gpu", GPUS[name].device_kind, None)


def lowered(case, device_kind):
    """The program of a case for a GPU that is known by its name only."""
    unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in (MOSAIC, TRITON)]
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="cuda")
    mesh = AbstractMesh((1,), ("device",), (AxisType.Auto,), abstract_device=device)
    run = jax.jit(lambda *arrays: case.function(*arrays))
    with jax.sharding.use_abstract_mesh(mesh):
        exported = export.export(run, platforms=["cuda"], disabled_checks=unchecked)(*case.shapes)
    return exported.mlir_module()


MOSAIC, TRITON = "mosaic_gpu_v2", "__gpu$xla.gpu.triton"
LOWERED = {
    # name: case, calls of kernels
    "dense": (cases.decode("lm_infinite"), 1),
    "unified": (cases.decode("llama3_8b", unified=True), 1),
    "paged": (cases.paged("llama3_8b_mixed"), 2),
    "shared": (cases.prefix("llama3_8b_system_prompt"), 3),
    "8 bits": (cases.quantized("llama3_8b_8bit"), 1),
    "4 bits": (cases.quantized("llama3_8b_4bit"), 1),
    "2 bits": (cases.quantized("llama3_8b_2bit"), 1),
}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", LOWERED)
def test_the_kernels_are_chosen_and_lower_for_cuda_without_a_gpu(name):
    case, number = LOWERED[name]
    text = lowered(case, GPUS["h100"].device_kind)
    assert text.count("@" + MOSAIC) + text.count("@" + TRITON) == number


def test_another_gpu_runs_the_plain_function_and_one_warning_says_why():
    with pytest.warns(UserWarning, match="plain function runs.*A100.*not a Hopper GPU"):
        text = lowered(cases.decode("lm_infinite"), "NVIDIA A100-SXM4-40GB")
    assert "@" + MOSAIC not in text


@pytest.mark.parametrize(
    ("sizes", "dtype", "device", "said"),
    [
        ((1, 8, 2, 1024, 128), jnp.bfloat16, "NVIDIA H200", None),
        ((1, 8, 2, 1024, 128), jnp.bfloat16, "NVIDIA A100-SXM4-80GB", "not a Hopper GPU"),
        ((1, 8, 2, 1024, 128), jnp.float32, "NVIDIA H200", "float32"),
        ((1, 8, 2, 1024, 96), jnp.bfloat16, "NVIDIA H200", "head_dim 96"),
        ((1, 8, 2, 1020, 128), jnp.bfloat16, "NVIDIA H200", "1020 slots"),
        ((33, 8, 2, 1024, 128), jnp.bfloat16, "NVIDIA H200", "132 rows"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(sizes, dtype, device, said):
    queries, heads, kv_heads, slots, dim = sizes
    q = jax.ShapeDtypeStruct((4, queries, heads, dim), dtype)
    k = jax.ShapeDtypeStruct((4, kv_heads, slots, dim), dtype)
    reason = gpu.obstacle(Target("gpu", device, None), {"q": q, "k": k, "v": k}, {})
    assert reason is None if said is None else said in str(reason)


def test_pages_that_the_kernels_do_not_take_are_said():
    q = jax.ShapeDtypeStruct((4, 8, 128), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((9, 24, 4, 128), jnp.bfloat16)
    step = {"max_query_length": 1}
    reason = paged_gpu.obstacle(on("h100"), {"q": q, "pages": pages}, step)
    assert "pages of 24 tokens" in str(reason)
    whole = pages.update(shape=(9, 16, 4, 128))
    assert paged_gpu.obstacle(on("h100"), {"q": q, "pages": whole}, step) is None
    pages = jax.eval_shape(lambda: KiviPages.empty(1, 2, 2, 256, 128))
    q = jax.ShapeDtypeStruct((4, 1, 8, 128), jnp.bfloat16)
    reason = quantized_gpu.obstacle(on("h100"), {"q": q, "pages": pages}, {})
    assert "page_size 256" in str(reason)


@on_a_described_gpu
@pytest.mark.parametrize("name", ["llama3_8b", "lm_infinite"])
def test_decoding_compiles_with_its_values_in_registers_and_without_a_copy_of_the_cache(name):
    case = cases.decode(name)
    compiled = compile_and_fit(case.function, case.shapes, kernels=1)
    assert compiled.temp_bytes < 0.01 * compiled.argument_bytes


@on_a_described_gpu
@pytest.mark.parametrize("name", ["llama3_8b_decode", "llama3_8b_mixed"])
def test_a_paged_step_compiles_with_its_values_in_registers(name):
    case = cases.paged(name)
    kernels = 1 if name == "llama3_8b_decode" else 2
    compiled = compile_and_fit(case.function, case.shapes, kernels=kernels)
    assert compiled.temp_bytes < 0.1 * compiled.argument_bytes


@on_a_described_gpu
def test_the_unified_softmax_compiles_inside_shard_map():
    mesh = described_mesh("h200", {"tensor": 2})
    heads, kv_heads = P(None, None, "tensor"), P(None, None, "tensor")
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    shapes = (array((8, 1, 16, 128)), *[array((2, 8, 4, 2048, 128))] * 2, cases.whole(8))
    specs = (heads, kv_heads, kv_heads, P())

    def run(q, k, v, lengths):
        softmax = Unified(jnp.zeros(q.shape[2]))
        return decode_attention(q, k, v, lengths, layer=1, softmax=softmax)

    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    compiled = compile_and_fit(split, shapes, kernels=1, spilled=64, mesh=mesh, specs=specs)
    assert "all-gather" not in compiled.text


@on_a_described_gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("bits", [8, 2])
def test_quantized_decoding_compiles(bits):
    case = cases.quantized(f"llama3_8b_{bits}bit")
    compiled = compile_for(case.function, case.shapes, "h100")
    assert "quantized_attention" in compiled.text
    assert compiled.temp_bytes < 0.1 * compiled.argument_bytes
