"""GPTQ, AWQ and bitsandbytes layouts: published words and bytes, and all that is written comes back
to the bit.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weights import Grouped, Permuted, dequantize, float4, grouped, int8, normal_float
from weights.interop import LayoutError, awq, bitsandbytes, gptq
from weights.interop.layout import pack_bits, unpack_bits


def words(array):
    return [f"{int(word) & 0xFFFFFFFF:08x}" for word in np.asarray(array).reshape(-1)]


def same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_words_are_the_published_ones():
    eight = np.arange(32)[:, None] % 8
    assert words(pack_bits(eight, 3, 0)) == ["88fac688", "c688fac6", "fac688fa"]
    assert words(pack_bits(eight[:8], 4, 0)) == ["76543210"]
    codes = np.arange(8)[None].repeat(4, axis=0)
    weight = grouped.from_codes(jnp.asarray(codes), jnp.ones((1, 8), jnp.float16), bits=4)
    arrays, _ = awq.write(weight)
    assert set(words(arrays["qweight"])) == {"75316420"}
    arrays, _ = gptq.write(grouped.from_codes(jnp.zeros((8, 8), int), jnp.ones((1, 8)), bits=4))
    assert words(arrays["qzeros"]) == ["77777777"]
    arrays, _ = gptq.write(
        grouped.from_codes(jnp.zeros((8, 8), int), jnp.ones((1, 8)), bits=4), "gptq_v2"
    )
    assert words(arrays["qzeros"]) == ["88888888"]


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 5, 8]), lines=st.integers(1, 3), seed=st.integers(0, 9))
def test_numbers_of_any_bits_come_back_from_words(bits, lines, seed):
    numbers = np.random.default_rng(seed).integers(0, 2**bits, (32 * lines, 3))
    np.testing.assert_array_equal(unpack_bits(pack_bits(numbers, bits, 0), bits, 0), numbers)
    np.testing.assert_array_equal(unpack_bits(pack_bits(numbers.T, bits, 1), bits, 1), numbers.T)


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_is_read_by_its_formula_and_written_to_the_bit(bits, symmetric, version):
    rng = np.random.default_rng(bits)
    rows, columns, group = 64, 32, 32
    codes = rng.integers(0, 2**bits, (rows, columns))
    zeros = rng.integers(1, 2**bits, (2, columns))
    zeros = np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    index = rng.permutation(np.arange(rows) // group).astype(np.int32)
    scales = rng.uniform(0.1, 1, (2, columns)).astype(np.float16)
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": True,
        "sym": symmetric,
        "checkpoint_format": version,
    }
    arrays = {
        "qweight": pack_bits(codes, bits, 0),
        "qzeros": pack_bits(zeros - (version == "gptq"), bits, 1),
        "scales": scales,
        "g_idx": index,
    }
    weight = gptq.read(arrays, config)
    expected = scales.astype(np.float64)[index] * (codes - zeros[index])
    np.testing.assert_allclose(dequantize(weight), expected, rtol=1e-6)
    assert isinstance(weight, Permuted)
    written, settings_written = gptq.write(weight, version)
    same(written, arrays)
    assert settings_written == config
    plain = gptq.read({k: v for k, v in arrays.items() if k != "g_idx"}, config)
    assert isinstance(plain, Grouped)


def test_gptq_zeros_that_wrapped_around_are_read_as_readers_do_and_said():
    weight = grouped.from_codes(
        jnp.zeros((32, 8), int), jnp.ones((1, 8), jnp.float16), jnp.ones((1, 8), int), bits=4
    )
    arrays, config = gptq.write(weight)
    arrays["qzeros"] = pack_bits(np.full((1, 8), 15), 4, 1)
    with pytest.warns(UserWarning, match="read as 16"):
        read = gptq.read(arrays, config)
    np.testing.assert_array_equal(dequantize(read), -16)


def test_awq_is_read_by_its_formula_and_written_to_the_bit():
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (64, 24)), rng.integers(0, 16, (2, 24))
    scales = rng.uniform(0.1, 1, (2, 24)).astype(np.float16)
    given = jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(zeros)
    arrays, config = awq.write(grouped.from_codes(*given, bits=4, group=32))
    weight = awq.read(arrays, config)
    expected = (scales[:, None] * (codes.reshape(2, 32, 24) - zeros[:, None])).reshape(64, 24)
    np.testing.assert_allclose(dequantize(weight), expected, rtol=1e-6)
    same(awq.write(weight)[0], arrays)


GOLDEN = {
    "nf4": "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff",
    "fp4": "bbbbbbaaaaaaaadddddccccffeeee99911166667744445555522222222333333",
}


@pytest.mark.parametrize("kind", GOLDEN)
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_four_bits_are_theirs_to_the_byte(kind, double):
    make = {"nf4": normal_float.quantize, "fp4": float4.quantize}[kind]
    column = jnp.arange(64) - 31.5
    arrays, _ = bitsandbytes.write(make(column[:, None], 64), kind)
    assert bytes(arrays["weight"][:, 0]).hex() == GOLDEN[kind]
    w = jnp.asarray(np.random.default_rng(0).normal(size=(128, 12)), jnp.float32)
    weight = make(w, 64, double=double)
    arrays, config = bitsandbytes.write(weight, kind)
    read = bitsandbytes.read(arrays, config)
    np.testing.assert_array_equal(dequantize(read), dequantize(weight))
    same(bitsandbytes.write(read, kind)[0], arrays)
    state = json.loads(bytes(arrays[f"{bitsandbytes.STATE}{kind}"]))
    assert state["shape"] == [12, 128]
    assert ("nested_offset" in state) == double


def test_bitsandbytes_eight_bits_come_back():
    weight = int8.quantize(jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), jnp.float32))
    arrays, config = bitsandbytes.write(weight)
    expected = arrays["weight"].T.astype(np.float64) * arrays["SCB"] / 127
    np.testing.assert_allclose(dequantize(bitsandbytes.read(arrays, config)), expected, rtol=1e-6)


def test_what_does_not_fit_is_said_by_key():
    weight = grouped.from_codes(jnp.zeros((32, 8), int), jnp.ones((1, 8), jnp.float16), bits=4)
    arrays, config = gptq.write(weight)
    cases = [
        ({**arrays, "scales": arrays["scales"][:, :4]}, config, r"scales is \[1, 4\].*\[1, 8\]"),
        (arrays, {**config, "bits": 5}, r"bits = 5: must be 2, 3, 4, 8"),
        ({**arrays, "gidx": arrays["g_idx"]}, config, "gidx is not an array.*nearest: g_idx"),
        ({"qweight": arrays["qweight"]}, config, "qzeros is missing"),
        (arrays, {**config, "group_size": 24}, "group_size = 24 does not divide 32"),
        ({**arrays, "g_idx": arrays["g_idx"] - 1}, config, "g_idx does not put 32 inputs"),
    ]
    for these, settings_given, message in cases:
        with pytest.raises(LayoutError, match=message):
            gptq.read(these, settings_given)
    with pytest.raises(LayoutError, match="no whole numbers"):
        gptq.write(grouped.from_codes(
            jnp.zeros((32, 8), int), jnp.ones((1, 8)), jnp.full((1, 8), 0.5), bits=4
        ))  # fmt: skip
    odd = normal_float.quantize(jnp.ones((48, 3)), 16)
    arrays, _ = bitsandbytes.write(odd)
    state = json.loads(bytes(arrays[f"{bitsandbytes.STATE}nf4"]))
    arrays[f"{bitsandbytes.STATE}nf4"] = np.frombuffer(
        json.dumps({**state, "blocksize": 64}).encode(), np.uint8
    )
    with pytest.raises(LayoutError, match="a block would cross two outputs"):
        bitsandbytes.read(arrays)
