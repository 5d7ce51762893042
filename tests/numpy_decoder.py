"""A Llama-like decoder in float64 NumPy, written from the authors' published code, that families
without a class in transformers are held to; and the checks that their tests share.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from family_checks import LENGTH, close, our_logits, stepwise_logits, tensors_of
from safetensors.numpy import save_file

from model.families import export_checkpoint, import_checkpoint


@dataclass
class Layer:
    """Matrices as torch stores them, `[out, in]`; biases of query, key, value and output."""

    attention_norm: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray
    feed_forward_norm: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    biases: tuple = (0.0, 0.0, 0.0, 0.0)


@dataclass
class Decoder:
    """What a family's file says: `rotate(x [length, heads, head_dim])`, or ALiBi slopes."""

    embed: np.ndarray
    layers: list
    final_norm: np.ndarray
    head: np.ndarray
    head_dim: int
    eps: float
    rotate: Callable[[np.ndarray], np.ndarray] | None = None
    slopes: np.ndarray | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    def __call__(self, tokens):
        """Logits `[length, vocab]`."""
        x = self.embed[tokens] * self.embedding_scale
        for layer in self.layers:
            normed = rms(x, layer.attention_norm, self.eps)
            x = x + self.residual_scale * self.attention(normed, layer)
            normed = rms(x, layer.feed_forward_norm, self.eps)
            gate = normed @ layer.gate.T
            inner = gate / (1.0 + np.exp(-gate)) * (normed @ layer.up.T)
            x = x + self.residual_scale * inner @ layer.down.T
        return self.logit_scale * rms(x, self.final_norm, self.eps) @ self.head.T

    def attention(self, x, layer):
        """Each query head with the key head of its group, masked to the past."""
        length, (bias_q, bias_k, bias_v, bias_o) = len(x), layer.biases
        q = (x @ layer.query.T + bias_q).reshape(length, -1, self.head_dim)
        k = (x @ layer.key.T + bias_k).reshape(length, -1, self.head_dim)
        v = (x @ layer.value.T + bias_v).reshape(length, -1, self.head_dim)
        if self.rotate is not None:
            q, k = self.rotate(q), self.rotate(k)
        out = np.empty_like(q)
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = q[:, head] @ k[:, group].T / math.sqrt(self.head_dim)
            if self.slopes is not None:
                scores = scores + self.slopes[head] * np.arange(length)
            scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, group]
        return out.reshape(length, -1) @ layer.output.T + bias_o


def rms(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate_half(x, base=10000.0):
    """RoPE that pairs channel i with i + head_dim / 2 (Llama's code)."""
    half = x.shape[-1] // 2
    turn = _turns(len(x), half, base)
    rotated = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([rotated.real, rotated.imag], axis=-1)


def rotate_pairs(x, base=10000.0):
    """RoPE that pairs neighbouring channels of the first half of a head (ChatGLM's code)."""
    rotary = x.shape[-1] // 2
    rotated = (x[..., 0:rotary:2] + 1j * x[..., 1:rotary:2]) * _turns(len(x), rotary // 2, base)
    turned = np.stack([rotated.real, rotated.imag], axis=-1).reshape(*x.shape[:-1], rotary)
    return np.concatenate([turned, x[..., rotary:]], axis=-1)


def _turns(length, count, base):
    frequencies = base ** -(np.arange(count) / count)
    return np.exp(1j * np.arange(length)[:, None, None] * frequencies)


def random_tensors(shapes, seed=0):
    """Float32 values by name; norms are near one."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(0.0, 0.3, shape) + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }


def check_reference(values, tensors, decoder, tmp_path):
    """Whole rows, rows padded on either side, token by token; the export is bit-equal.

    `decoder(wide tensors, length of the longest row) -> Decoder`.
    """
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    found = import_checkpoint(folder)
    wide = {name: value.astype(np.float64) for name, value in tensors.items()}
    reference = decoder(wide, LENGTH)
    tokens = np.random.default_rng(1).integers(3, 40, (2, LENGTH)).astype(np.int32)
    expected = np.stack([reference(row) for row in tokens])
    assert np.abs(expected).max() > 0.1
    close(our_logits(found.params, tokens, None, found.config), expected)
    close(stepwise_logits(found.params, jnp.asarray(tokens), found.config), expected)
    for padding in (slice(0, 4), slice(LENGTH - 4, LENGTH)):
        mask = np.ones((2, LENGTH), np.int32)
        mask[0, padding] = 0
        padded = expected.copy()
        padded[0, mask[0] == 1] = reference(tokens[0, mask[0] == 1])
        close(our_logits(found.params, tokens, mask, found.config), padded, mask)
    exported = export_checkpoint(found, tmp_path / "ours")
    assert tensors_of(exported) == tensors_of(folder)
    written = json.loads((exported / "config.json").read_text())
    assert {name: written.get(name, value) for name, value in values.items()} == values
    assert import_checkpoint(exported).config == found.config
    return found
