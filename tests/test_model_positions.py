"""Rotary embeddings, their scalings, ALiBi slopes and norms, against closed forms, NumPy and
transformers.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model import ModelConfig, RopeScaling
from model.norms import layer_norm, rms_norm
from model.positions import PositionEncoder, alibi_slopes
from model.rope import ROPE_SCALINGS, rotary_frequencies

CONFIG = ModelConfig(d_model=32, num_heads=2, num_layers=1)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_rotation_is_a_complex_product_in_each_channel_pair(layout, rotary_dim):
    x = RNG.normal(size=(2, 5, 3, 16))
    positions = RNG.integers(0, 1000, size=(2, 5))
    config = dataclasses.replace(CONFIG, rotary_layout=layout, rotary_dim=rotary_dim).resolve()
    out = PositionEncoder(config).rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions))
    frequencies = 10000.0 ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    turn = np.exp(1j * positions[..., None] * frequencies)[:, :, None, :]
    half = rotary_dim // 2
    first = np.arange(half) if layout == "half" else np.arange(0, rotary_dim, 2)
    second = first + half if layout == "half" else first + 1
    expected = x.copy()
    turned = (x[..., first] + 1j * x[..., second]) * turn
    expected[..., first], expected[..., second] = turned.real, turned.imag
    np.testing.assert_allclose(out, expected, atol=2e-4)


def test_rotated_products_depend_on_distance_only():
    config = CONFIG.resolve()
    q, k = (jnp.asarray(RNG.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(i, j):
        rotate = PositionEncoder(config).rotate
        return float(jnp.sum(rotate(q, jnp.asarray([[i]])) * rotate(k, jnp.asarray([[j]]))))

    np.testing.assert_allclose(product(7, 3), product(107, 103), rtol=1e-4)


FACTORS = st.floats(1.0, 64.0)
LENGTHS = st.sampled_from([64, 100, 2048, 8192])
OUR_NAMES = {
    "original_max_position_embeddings": "original_max_length",
    "partial_rotary_factor": "rotary_share",
}
"""Their parameter -> our field where the names differ."""


def divisors(draw, count):
    return draw(st.lists(st.floats(1.0, 50.0), min_size=count, max_size=count))


@st.composite
def their_parameters(draw, kind):
    """`(rope_parameters, rotary_dim, trained length)` as transformers may be given them."""
    head_dim, trained = draw(st.sampled_from([8, 16, 64, 128])), draw(LENGTHS)
    share = draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    theirs = {"rope_type": kind, "factor": draw(FACTORS), "partial_rotary_factor": share}
    theirs["rope_theta"] = draw(st.sampled_from([1e4, 5e5, 1e6]))
    if kind in ("llama3", "yarn", "longrope"):
        theirs["original_max_position_embeddings"] = trained
    if kind == "llama3":
        theirs["low_freq_factor"] = draw(st.floats(0.5, 2.0))
        theirs["high_freq_factor"] = theirs["low_freq_factor"] + draw(st.floats(0.5, 6.0))
    if kind == "yarn":
        theirs["beta_slow"] = draw(st.floats(0.5, 4.0))
        theirs["beta_fast"] = theirs["beta_slow"] + draw(st.floats(0.0, 40.0))
        theirs["truncate"] = draw(st.booleans())
        theirs["mscale"], theirs["mscale_all_dim"] = (draw(st.floats(0.0, 2.0)) for _ in "ab")
    if kind in ("yarn", "longrope"):
        theirs["attention_factor"] = draw(st.none() | st.floats(0.5, 2.0))
    if kind == "longrope":
        names = ("short_factor", "long_factor")
        theirs.update({name: divisors(draw, int(head_dim * share) // 2) for name in names})
    return theirs, head_dim, trained


def our_scaling(theirs, trained):
    fields = {field.name for field in dataclasses.fields(RopeScaling)}
    named = {OUR_NAMES.get(name, name): value for name, value in theirs.items()}
    ours = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in named.items()
        if name in fields and not (name == "rotary_share" and theirs["rope_type"] != "proportional")
    }
    return RopeScaling(theirs["rope_type"], **{"original_max_length": trained, **ours})


@pytest.mark.interop
@pytest.mark.parametrize("kind", ROPE_SCALINGS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_scaled_frequencies_equal_transformers_over_their_parameters(kind, data):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, head_dim, trained = data.draw(their_parameters(kind))
    length = data.draw(st.sampled_from([trained // 2, trained, trained + 1, 3 * trained]))
    config = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=trained, rope_parameters=dict(theirs)
    )
    share = 1.0 if kind == "proportional" else theirs["partial_rotary_factor"]
    scaling, rotary_dim = our_scaling(theirs, trained), int(head_dim * share)
    assume(kind != "dynamic" or rotary_dim >= 4)  # else transformers divides by zero
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    frequencies, our_factor = rotary_frequencies(rotary_dim, theirs["rope_theta"], scaling, length)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=3e-5)
    assert our_factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.interop
def test_every_scaling_of_transformers_is_known():
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    assert set(utils.ROPE_INIT_FUNCTIONS) <= set(ROPE_SCALINGS)


def test_alibi_slopes_of_a_power_of_two_are_geometric_and_others_interleave():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(
        alibi_slopes(6), [2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0, 2**-1.0, 2**-3.0]
    )


@pytest.mark.interop
@pytest.mark.parametrize("heads", [3, 4, 12, 16, 20])
def test_alibi_slopes_equal_transformers(heads):
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    bias = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    np.testing.assert_allclose(alibi_slopes(heads), bias[:, 0, 1].numpy(), rtol=1e-6)


@pytest.mark.interop
@pytest.mark.parametrize("heads", [4, 6, 8, 71])
def test_falcon_slopes_leave_two_roundings_of_slope_times_position(heads):
    torch = pytest.importorskip("torch")
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    config = ModelConfig(
        d_model=heads * 8,
        num_heads=heads,
        positions="alibi",
        alibi_scale=8**-0.5,
        alibi_dtype="bfloat16",
    )
    mask = torch.ones(1, 2048, dtype=torch.long)
    bias = falcon.build_alibi_tensor(mask, heads, torch.float32)[:, 0].numpy()
    ours = np.asarray(PositionEncoder(config.resolve()).slopes())[:, None] * np.arange(2048)
    gap = np.abs(ours - bias / 8**0.5)
    assert (gap <= ours * 2.02 * 2.0**-8).all()
    if heads in (4, 8):  # every slope is a power of two
        assert (gap[:, :257] <= ours[:, :257] * 1e-6).all()


def test_norms_equal_float64_numpy():
    x = RNG.normal(loc=3.0, size=(4, 7, 24))
    scale, bias = RNG.normal(size=24), RNG.normal(size=24)
    single = [jnp.asarray(value, jnp.float32) for value in (x, scale, bias)]
    root = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_norm(*single[:2], 1e-5), x / root * scale, atol=1e-5)
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        layer_norm(*single, 1e-5), centred / deviation * scale + bias, atol=2e-5
    )
