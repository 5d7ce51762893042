"""Rotary embeddings, their scalings, ALiBi slopes and norms, against closed forms, NumPy and
transformers.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from model import ModelConfig, RopeScaling
from model.norms import layer_norm, rms_norm
from model.positions import PositionEncoder, alibi_slopes
from model.rope import rotary_frequencies

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


SCALINGS = {
    "linear": (RopeScaling("linear", 4.0), {}),
    "dynamic": (RopeScaling("dynamic", 4.0, 64), {}),
    "llama3": (
        RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0),
        {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": (RopeScaling("yarn", 4.0, 64), {"original_max_position_embeddings": 64}),
    "yarn_deepseek": (
        RopeScaling(
            "yarn", 4.0, 64, beta_fast=16.0, mscale=1.0, mscale_all_dim=0.7, truncate=False
        ),
        {
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "truncate": False,
        },
    ),
    "longrope": (
        RopeScaling(
            "longrope",
            4.0,
            64,
            short_factor=tuple(1.0 + 0.1 * i for i in range(8)),
            long_factor=tuple(2.0 + 0.3 * i for i in range(8)),
        ),
        {
            "original_max_position_embeddings": 64,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.3 * i for i in range(8)],
        },
    ),
}


@pytest.mark.interop
@pytest.mark.parametrize("length", [48, 200])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_equal_transformers(name, length):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, theirs = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": scaling.kind,
            "rope_theta": 10000.0,
            "factor": scaling.factor,
            **theirs,
        },
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu", seq_len=length)
    frequencies, our_factor = rotary_frequencies(16, 10000.0, scaling, length)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=2e-5)
    assert our_factor == pytest.approx(factor, rel=1e-6)


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
