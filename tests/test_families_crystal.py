"""CrystalCoder, BTLM and Jais, which transformers lacks, are held to a NumPy forward in float64.

The reference follows the published code of the three (GPT-2 with the factors of muP, SwiGLU, ALiBi
and rotation of neighbouring channels), in their names and their storage.
"""

import json
import math

import numpy as np
import pytest
from family_checks import close, our_logits, stepwise_logits, tensors_of
from safetensors.numpy import save_file

from model import generate
from model.families import (
    FAMILIES,
    FamilyError,
    config_from_hf,
    config_to_hf,
    describe_as,
    export_checkpoint,
    import_checkpoint,
)
from model.families.plan import their_shapes

LENGTH = 12
SIZES = {
    "vocab_size": 40,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 22,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
MUP = {"mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22, "mup_width_scale": 0.0625}
CASES = {
    "crystal": {
        "model_type": "crystalcoder",
        "activation_function": "swiglu",
        "position_embedding_type": "rotary",
        "rotary_dim": 4,
        "mup_scale_qk_dot_by_d": True,
        **MUP,
    },
    "btlm": {
        "model_type": "btlm",
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
        "alibi_scaling": {"type": "linear", "factor": 2.0},
        "mup_scale_qk_dot_by_d": True,
        **MUP,
    },
    "gpt2_with_mup": {
        "model_type": "btlm",
        "activation_function": "gelu_new",
        "position_embedding_type": "learned",
        "scale_attn_by_inverse_layer_idx": True,
        **MUP,
        "mup_embeddings_scale": 3.0,
    },
}


def random_tensors(values, seed=0):
    """Random weights in the published names, head included, biases away from zero."""
    rng = np.random.default_rng(seed)
    wide, inner, vocab = values["n_embd"], values["n_inner"], values["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, wide)}
    if values["position_embedding_type"] == "learned":
        shapes["transformer.wpe.weight"] = (values["n_positions"], wide)
    linears = {"attn.c_attn": (wide, 3 * wide), "attn.c_proj": (wide, wide)}
    linears |= {"mlp.c_fc": (wide, inner), "mlp.c_proj": (inner, wide)}
    if values["activation_function"] == "swiglu":
        linears["mlp.c_fc2"] = (wide, inner)
    for layer in range(values["n_layer"]):
        for name, shape in linears.items():
            shapes[f"transformer.h.{layer}.{name}.weight"] = shape
            shapes[f"transformer.h.{layer}.{name}.bias"] = shape[1:]
        for name in ("ln_1", "ln_2"):
            shapes[f"transformer.h.{layer}.{name}.weight"] = (wide,)
            shapes[f"transformer.h.{layer}.{name}.bias"] = (wide,)
    shapes |= {"transformer.ln_f.weight": (wide,), "transformer.ln_f.bias": (wide,)}
    tensors = {
        name: (0.3 * rng.standard_normal(shape) + ("ln_" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    return tensors


def buffers(values):
    """What published files hold besides weights."""
    length = values["n_positions"]
    mask = np.tril(np.ones((1, 1, length, length), np.uint8))
    found: dict[str, np.ndarray] = {}
    for layer in range(values["n_layer"]):
        found[f"transformer.h.{layer}.attn.bias"] = mask.copy()
        found[f"transformer.h.{layer}.attn.masked_bias"] = np.array([-1e9], np.float32)
    if values["position_embedding_type"] == "alibi":
        found["transformer.relative_pe.slopes"] = np.ones((values["n_head"], 1), np.float32)
    return found


def layer_norm(x, weights, name, eps):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def conv1d(x, weights, name):
    return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate_neighbours(x, rotary_dim):
    """`[heads, length, head_dim]`: channels 2 i and 2 i + 1 as one complex number, turned."""
    pairs = x[..., :rotary_dim:2] + 1j * x[..., 1:rotary_dim:2]
    frequency = 10000.0 ** (-np.arange(rotary_dim // 2) * 2 / rotary_dim)
    turned = pairs * np.exp(1j * np.arange(x.shape[1])[:, None] * frequency)
    out = x.copy()
    out[..., :rotary_dim:2], out[..., 1:rotary_dim:2] = turned.real, turned.imag
    return out


def attention(x, weights, name, values, layer):
    heads = values["n_head"]
    head_dim = values["n_embd"] // heads
    packed = conv1d(x, weights, f"{name}.c_attn")
    q, k, v = (p.reshape(len(x), heads, head_dim).swapaxes(0, 1) for p in np.split(packed, 3, -1))
    if values["position_embedding_type"] == "rotary":
        q, k = (rotate_neighbours(part, values["rotary_dim"]) for part in (q, k))
    scores = q @ k.swapaxes(1, 2)
    scores /= head_dim if values.get("mup_scale_qk_dot_by_d") else math.sqrt(head_dim)
    if values.get("scale_attn_by_inverse_layer_idx"):
        scores /= layer + 1
    places = np.arange(len(x))
    if values["position_embedding_type"] == "alibi":
        slopes = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
        factor = (values.get("alibi_scaling") or {"factor": 1.0})["factor"]
        scores -= slopes[:, None, None] / factor * np.abs(places[:, None] - places)
    scores[:, places[:, None] < places] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return conv1d((shares @ v).swapaxes(0, 1).reshape(len(x), -1), weights, f"{name}.c_proj")


def reference(tensors, values, tokens):
    """Logits `float64[length, vocab]` of one row without padding."""
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    eps = values["layer_norm_epsilon"]
    x = weights["transformer.wte.weight"][tokens]
    if values["position_embedding_type"] == "learned":
        x = x + weights["transformer.wpe.weight"][: len(tokens)]
    x = x * values["mup_embeddings_scale"]
    for layer in range(values["n_layer"]):
        name = f"transformer.h.{layer}"
        normed = layer_norm(x, weights, f"{name}.ln_1", eps)
        x = x + attention(normed, weights, f"{name}.attn", values, layer)
        normed = layer_norm(x, weights, f"{name}.ln_2", eps)
        hidden = conv1d(normed, weights, f"{name}.mlp.c_fc")
        if values["activation_function"] == "swiglu":
            hidden = hidden * silu(conv1d(normed, weights, f"{name}.mlp.c_fc2"))
        else:
            hidden = gelu_new(hidden)
        x = x + conv1d(hidden, weights, f"{name}.mlp.c_proj")
    scores = layer_norm(x, weights, "transformer.ln_f", eps) @ weights["lm_head.weight"].T
    return scores * values["mup_output_alpha"] * values["mup_width_scale"]


def write_folder(folder, values, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name, tmp_path):
    """Logits, padded on either side and step by step, greedy tokens, and the files themselves."""
    values = {**SIZES, **CASES[name]}
    tensors = random_tensors(values)
    folder = write_folder(tmp_path / "theirs", values, tensors | buffers(values))
    found = import_checkpoint(folder)
    tokens = np.random.default_rng(1).integers(3, 40, (2, LENGTH)).astype(np.int32)
    expected = np.stack([reference(tensors, values, row) for row in tokens])
    assert np.abs(expected).max() > 0.1
    close(our_logits(found.params, tokens, None, found.config), expected)
    close(stepwise_logits(found.params, tokens, found.config), expected)
    for side, real in ((slice(0, 4), slice(4, None)), (slice(8, None), slice(0, 8))):
        mask = np.ones((2, LENGTH), np.int32)
        mask[0, side] = 0
        padded = our_logits(found.params, tokens, mask, found.config)
        close(padded[0, real], reference(tensors, values, tokens[0, real]))
        close(padded[1], expected[1])
    rows = [tokens[0].tolist(), tokens[1, :5].tolist()]
    ours = generate(found.params, rows, found.config, max_new_tokens=5).lists()
    for row, new in zip(rows, ours, strict=True):
        for token in new:
            assert token == reference(tensors, values, np.array(row))[-1].argmax()
            row.append(token)
    export_checkpoint(found, tmp_path / "ours")
    assert tensors_of(tmp_path / "ours") == tensors_of(write_folder(tmp_path / "x", {}, tensors))
    assert import_checkpoint(tmp_path / "ours").config == found.config


def test_crystal_as_published():
    """Names, count and bytes are those of the published index and paper (arXiv 2411.04156)."""
    values = {
        "n_embd": 4096,
        "n_head": 32,
        "n_inner": 10922,
        "n_layer": 32,
        "n_positions": 2048,
        "vocab_size": 32032,
        "position_embedding_type": "rotary",
        "rotary_dim": 32,
        "activation_function": "swiglu",
        "mup_scale_qk_dot_by_d": True,
        **MUP,
    }
    crystal = FAMILIES["crystal"]
    config = config_from_hf(crystal, values)
    resolved = config.resolve()
    assert (resolved.attention_scale, resolved.rotary_dim) == (1 / 128, 32)
    assert resolved.logit_scale == pytest.approx(0.13875, rel=1e-12)
    assert config.base_d_model == 256
    shapes = their_shapes(crystal, config)
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count == 6_575_278_720
    head, masks = 4 * 32032 * 4096, 32 * (2048 * 2048 + 4)
    assert 4 * count + head + masks == 26_960_145_024
    assert shapes["transformer.h.31.mlp.c_fc2.weight"] == (4096, 10922)
    written = config_to_hf(crystal, config)
    assert {name: written[name] for name in values} == pytest.approx(values)


def test_old_words_of_jais():
    """Jais-13B gives the factors of embeddings and logits in words of its own."""
    old = {
        "position_embedding_type": "alibi",
        "activation_function": "swiglu",
        "embeddings_scale": 14.6,
        "width_scale": 0.22,
        "scale_qk_dot_by_d": True,
    }
    found = config_from_hf(FAMILIES["jais"], old)
    assert (found.embedding_scale, found.logit_scale) == (14.6, 0.22)
    assert found.attention_scale == 1 / 64
    written = config_to_hf(FAMILIES["jais"], found, old)
    assert "width_scale" not in written
    assert written["mup_output_alpha"] == 0.22


def test_a_model_of_ours_is_written_as_one_of_them():
    """Gated GPT-2 with ALiBi and muP, trained here, has a family that can say it."""
    values = {**SIZES, **CASES["btlm"]}
    config = config_from_hf(FAMILIES["btlm"], values)
    family, written = describe_as(config)
    assert family.name in ("crystal", "btlm")
    assert written["alibi_scaling"] == {"type": "linear", "factor": 2.0}
    assert written["mup_width_scale"] == 0.0625


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("btlm", {"position_embedding_type": "rotary"}, ["position_embedding_type", "rotary"]),
        ("crystal", {"position_embedding_type": "rotary"}, ["rotary_dim"]),
        (
            "btlm",
            {"position_embedding_type": "alibi", "alibi_scaling": {"type": "linear", "train": 8}},
            ["alibi_scaling", "train"],
        ),
        ("crystal", {"activation_function": "geglu"}, ["activation_function", "geglu"]),
        ("crystal", {"mup_output_alfa": 2.0}, ["mup_output_alfa", "mup_output_alpha"]),
    ],
)
def test_what_cannot_be_said_is_named(family, values, words):
    with pytest.raises(FamilyError) as caught:
        config_from_hf(FAMILIES[family], values)
    for word in words:
        assert word in str(caught.value)
