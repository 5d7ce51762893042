"""The quantized product against float64: every width, group, table and odd size, with gradients, by
the function that a CPU runs and by the TPU kernels in interpret mode.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from kernels_pallas.quantized_matmul import blocks, cost, pack, quantized_matmul, reference, tpu
from kernels_pallas.quantized_matmul.operand import operand


def drawn(rows, columns, bits, group, *, form="packed", zeros=False, table=False, offsets=False):
    """Arguments of a product, and the matrix they stand for in float64."""
    rng = np.random.default_rng(rows * columns + bits)
    groups = rows // (group or rows)
    codes = rng.integers(0, 2**bits, (rows, columns))
    values = codes.astype(np.float64)
    arguments = {"bits": bits, "group": group, "scales": rng.uniform(0.5, 1.5, (groups, columns))}
    if table:
        entries = np.asarray(jnp.asarray(rng.normal(size=2**bits), jnp.bfloat16), np.float64)
        arguments["table"], values = entries, entries[codes]
    elif form == "int8":
        values = values - 2 ** (bits - 1)
    if zeros:
        arguments["zeros"] = rng.uniform(0, 2**bits, (groups, columns))
    elif not table and form != "int8":
        values = values - 2 ** (bits - 1)
    if offsets:
        arguments["offsets"] = rng.normal(size=(groups, columns))
    numbers = ("scales", "zeros", "offsets", "table")
    arguments = {
        name: jnp.asarray(value, jnp.float32) if name in numbers else value
        for name, value in arguments.items()
    }
    if form == "packed":
        arguments["codes"] = pack(jnp.asarray(codes), bits)
    else:
        signed = codes - 2 ** (bits - 1) if form == "int8" else codes
        arguments["codes"] = jnp.asarray(signed, jnp.int8 if form == "int8" else jnp.uint8)

    def spread(name):
        if name not in arguments:
            return 0.0
        return np.repeat(np.asarray(arguments[name], np.float64), rows // groups, axis=0)

    return arguments, spread("scales") * (values - spread("zeros")) + spread("offsets")


def as_operand(arguments, rows):
    parts = (arguments.get(name) for name in ("zeros", "offsets", "table", "select"))
    return operand(
        arguments["codes"],
        arguments["scales"],
        *parts,
        rows=rows,
        bits=arguments["bits"],
        group=arguments["group"],
    )


def normal(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def f64(x):
    return np.asarray(jnp.asarray(x, jnp.float32), np.float64)


def bound(x, w):
    """Float32 sums of exact products: 2**-22 for each, at the size of the largest."""
    return 2**-22 * x.shape[-1] * np.max(np.abs(x), initial=0) * np.max(np.abs(w), initial=0)


@settings(max_examples=12, deadline=None)
@given(
    m=st.sampled_from([0, 1, 5]),
    rows_and_group=st.sampled_from([(96, 32), (128, None), (200, 20), (300, None), (512, 128)]),
    columns=st.sampled_from([1, 33]),
    bits=st.integers(2, 8),
    form=st.sampled_from(["packed", "packed", "uint8", "int8"]),
    extra=st.sampled_from(["", "zeros", "offsets", "table"]),
)
def test_the_product_on_a_cpu_is_that_of_float64(m, rows_and_group, columns, bits, form, extra):
    rows, group = rows_and_group
    if extra == "table" and form == "int8":
        form = "packed"
    options = {extra: True} if extra else {}
    arguments, matrix = drawn(rows, columns, bits, group, form=form, **options)
    x = normal((m, rows))
    y = quantized_matmul(x, **arguments)
    assert y.dtype == jnp.float32
    assert np.max(np.abs(f64(y) - f64(x) @ matrix), initial=0) <= bound(f64(x), matrix)
    w = as_operand(arguments, rows)
    atol = 2**-20 * np.max(np.abs(matrix))
    np.testing.assert_allclose(reference.dequantize(w, jnp.float32), matrix, atol=atol)
    dy = normal((m, columns), seed=1)
    dx = f64(blocks.matmul_transposed(dy, w))
    assert np.max(np.abs(dx - f64(dy) @ matrix.T), initial=0) <= bound(f64(dy), matrix)


@pytest.mark.parametrize("m", [1, 3])
def test_the_last_block_of_columns_reaches_back(m):
    arguments, matrix = drawn(256, 1030, 4, 128, zeros=True)
    x = normal((m, 256))
    y = quantized_matmul(x, **arguments)
    assert np.max(np.abs(f64(y) - f64(x) @ matrix)) <= bound(f64(x), matrix)


@pytest.mark.parametrize("table", [False, True])
def test_gradients_are_those_of_the_dense_product(table):
    arguments, matrix = drawn(256, 24, 4, 64, zeros=True, offsets=True, table=table)
    codes, trained = arguments.pop("codes"), ("scales", "zeros", "offsets", "table")[: 3 + table]
    parts = {name: arguments.pop(name) for name in trained}
    x, dy = normal((2, 3, 256)), normal((2, 3, 24), seed=1)

    def loss(x, parts):
        return jnp.sum(dy * quantized_matmul(x, codes, **parts, **arguments))

    dx, got = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, parts)
    flat_x, flat_dy = f64(x).reshape(6, 256), f64(dy).reshape(6, 24)
    np.testing.assert_allclose(f64(dx).reshape(6, 256), flat_dy @ matrix.T, atol=1e-4)
    dw = (flat_x.T @ flat_dy).reshape(4, 64, 24)
    scale = f64(parts["scales"])[:, None]
    values = (matrix.reshape(dw.shape) - f64(parts["offsets"])[:, None]) / scale
    np.testing.assert_allclose(got["scales"], np.sum(dw * values, 1), atol=2e-3)
    np.testing.assert_allclose(got["zeros"], np.sum(-dw * scale, 1), atol=1e-3)
    np.testing.assert_allclose(got["offsets"], np.sum(dw, 1), atol=1e-3)
    if table:
        codes_of = np.argmin(
            np.abs((values + f64(parts["zeros"])[:, None])[..., None] - f64(parts["table"])), -1
        )
        expected = [np.sum((dw * scale)[codes_of == code]) for code in range(16)]
        np.testing.assert_allclose(got["table"], expected, atol=2e-3)


def test_groups_may_have_tables_of_their_own():
    rng = np.random.default_rng(0)
    codes, tables = rng.integers(0, 8, (256, 6)), rng.normal(size=(5, 8))
    select, scales = rng.integers(0, 5, (2, 6)), rng.uniform(size=(2, 6))
    matrix = np.repeat(scales, 128, 0) * tables[np.repeat(select, 128, 0), codes]
    x = normal((3, 256))
    y = quantized_matmul(
        x,
        pack(jnp.asarray(codes), 3),
        jnp.asarray(scales, jnp.float32),
        bits=3,
        group=128,
        table=jnp.asarray(tables, jnp.float32),
        select=jnp.asarray(select, jnp.uint8),
    )
    np.testing.assert_allclose(y, f64(x) @ matrix, atol=1e-4)


def test_scanned_and_mapped_products_are_those_of_each_layer():
    layers = [drawn(128, 8, 4, 32, zeros=True)[0] for _ in range(2)]
    names = ("codes", "scales", "zeros")
    stacked = [jnp.stack([layer[name] + 0 for layer in layers]) for name in names]
    x = normal((2, 3, 128))

    def product(x, codes, scales, zeros):
        return quantized_matmul(x, codes, scales, zeros, bits=4, group=32)

    one_by_one = jnp.stack([product(x[i], *(part[i] for part in stacked)) for i in range(2)])
    np.testing.assert_allclose(jax.vmap(product)(x, *stacked), one_by_one, atol=1e-4)
    scanned = jax.lax.scan(lambda _, args: (None, product(*args)), None, (x, *stacked))[1]
    np.testing.assert_allclose(scanned, one_by_one, atol=1e-4)


@pytest.mark.parametrize("split", ["rows", "columns"])
def test_a_matrix_split_over_devices_has_the_same_gradients(split):
    arguments, _ = drawn(512, 24, 4, 128, zeros=True)
    static = {name: arguments.pop(name) for name in ("bits", "group")}
    codes, x = arguments.pop("codes"), normal((5, 512))
    whole = P("tensor", None) if split == "rows" else P(None, "tensor")
    specs = (P(None, "tensor"), P()) if split == "rows" else (P(), P(None, "tensor"))

    def product(x, codes, parts):
        y = quantized_matmul(x, codes, **parts, **static)
        return jax.lax.psum(y, "tensor") if split == "rows" else y

    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    in_specs = (specs[0], whole, dict.fromkeys(arguments, whole))
    mapped = jax.shard_map(product, mesh=mesh, in_specs=in_specs, out_specs=specs[1])

    def gradients(function):
        def loss(x, parts):
            return jnp.sum(function(x, codes, parts) ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(x, arguments)

    alone = gradients(lambda x, codes, parts: quantized_matmul(x, codes, **parts, **static))
    for got, wanted in zip(jax.tree.leaves(gradients(mapped)), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4 * np.max(np.abs(wanted)))


def test_on_a_cpu_the_public_function_is_the_plain_one_and_keeps_no_float_matrix():
    arguments, _ = drawn(1024, 512, 4, 128, zeros=True)
    w = as_operand(arguments, 1024)
    for m in (1, 8):
        x = normal((m, 1024))
        ours = jax.jit(lambda x: quantized_matmul(x, **arguments)).lower(x).compile()
        plain = jax.jit(lambda x: blocks.matmul(x, w)).lower(x).compile()
        assert ours.cost_analysis() == plain.cost_analysis()
        assert ours.memory_analysis().temp_size_in_bytes < 1024 * 512 * 4


KERNEL_CASES = {
    # name: rows of input, rows, columns, bits, group, generation, what there is
    "int4": (3, 512, 200, 4, 128, "v5e", {"zeros": True}),
    "int3": (17, 640, 130, 3, 128, "v5e", {"zeros": True}),
    "int2_small_groups": (1, 384, 128, 2, 32, "v5e", {"zeros": True, "offsets": True}),
    "int5_columns": (5, 300, 72, 5, None, "v6e", {}),
    "int8_words": (2, 256, 64, 8, 64, "v5e", {"zeros": True}),
    "int8": (2, 256, 129, 8, 64, "v5e", {"form": "int8"}),
    "table_lanes": (4, 256, 130, 4, 64, "v4", {"table": True}),
    "table_sublanes": (4, 256, 130, 4, 64, "v5e", {"table": True}),
    "table_bytes": (4, 256, 130, 4, 64, "v6e", {"table": True}),
    "table_of_8": (4, 512, 40, 3, 64, "v6e", {"table": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_tpu_kernels_compute_what_float64_does(name):
    m, rows, columns, bits, group, generation, options = KERNEL_CASES[name]
    arguments, matrix = drawn(rows, columns, bits, group, **options)
    w = as_operand(arguments, rows)
    x, dy = normal((m, rows), jnp.bfloat16), normal((m, columns), jnp.bfloat16, 1)
    x = x.at[-1, -1].set(jnp.nan) if m > 1 else x
    assert tpu.unsupported(x, w) is None
    y = f64(tpu.matmul(x, w, generation=generation, interpret=True))
    clean = m - 1 if m > 1 else 1
    assert np.all(np.isnan(y[clean:]))
    error = np.max(np.abs(y[:clean] - f64(x)[:clean] @ matrix))
    assert error <= bound(f64(x)[:clean], matrix)
    dx = f64(tpu.matmul_transposed(dy, w, generation=generation, interpret=True))
    rounding = 2**-9 * np.linalg.norm(f64(dy)[:, :, None] * matrix.T, axis=1)  # of dy * scale
    assert np.all(np.abs(dx - f64(dy) @ matrix.T) <= 6 * rounding + 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "m"), [(8, 3), (64, 256)])
def test_tiles_that_are_scaled_first_are_those_of_a_rounded_matrix(group, m):
    arguments, matrix = drawn(256, 130, 4, group, zeros=True)
    w = as_operand(arguments, 256)
    x, dy = normal((m, 256), jnp.bfloat16), normal((m, 130), jnp.bfloat16, 1)
    rounded = f64(jnp.asarray(matrix, jnp.bfloat16))
    y = f64(tpu.matmul(x, w, generation="v6e", interpret=True))
    dx = f64(tpu.matmul_transposed(dy, w, generation="v6e", interpret=True))
    for got, taken, wanted in ((y, x, rounded), (dx, dy, rounded.T)):
        error = np.abs(got - f64(taken) @ wanted)
        flips = 2**-8 * np.max(np.abs(matrix)) * np.max(np.abs(f64(taken)))  # of a tie's rounding
        assert np.max(error) <= bound(f64(taken), matrix) + flips


def test_float32_input_keeps_its_precision_in_the_kernel():
    arguments, matrix = drawn(128, 16, 4, 32, zeros=True)
    x = normal((2, 128))
    y = tpu.matmul(x, as_operand(arguments, 128), generation="v5e", interpret=True)
    assert np.max(np.abs(f64(y) - f64(x) @ matrix)) <= bound(f64(x), matrix)


def test_cost_counts_each_array_once():
    flops, moved = cost(16, 4096, 14336, bits=4, group=128, zeros=True)
    assert flops == 2 * 16 * 4096 * 14336
    assert moved == 4096 * 14336 // 2 + 2 * 32 * 14336 * 4 + 2 * 16 * (4096 + 14336)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": None}, "need bits"),
        ({"bits": 3}, "codes has 16 rows of words; 128 input features of 3 bits take 24"),
        ({"group": 48}, "group=48 does not divide the 128 input features"),
        ({"zeros": jnp.zeros((2, 8))}, r"zeros has shape \(2, 8\).*take \(4, 8\)"),
        ({"table": jnp.zeros(8)}, r"table has shape \(8,\); codes of 4 bits take 16"),
        ({"select": jnp.zeros((4, 8), jnp.uint8)}, "there is no table"),
        ({"implementation": "tpus"}, "'tpus' is not known; nearest: tpu"),
        ({"implementation": "tpu"}, "compiled for cpu"),
        ({"codes": jnp.zeros((128, 8))}, "codes are whole numbers"),
        ({"codes": jnp.zeros((96, 8), jnp.int8)}, "codes has 96 rows; the input has 128"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    arguments, _ = drawn(128, 8, 4, 32)
    with pytest.raises(ValueError, match=words):
        quantized_matmul(normal((2, 128)), **{**arguments, **change})
