"""The tensors of a Hugging Face checkpoint, described once and read in both directions.

A `Tensor` says which of our arrays lie in one of theirs: its name, whether it is stored `[out,
in]`, and how the outputs of several arrays are packed in it. A packing is nothing but row numbers:
part p of a packed tensor is its rows `rows[p]`. So the import takes rows, the export puts them
back, and one test (the rows of all parts are a permutation) holds both.

Names may hold `{layer}`, `{expert}` and `{head}`; paths are those of the params tree without the
segment: `layers/attention/query/kernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.config import ModelConfig

Packing = Callable[[ModelConfig, Sequence[int]], tuple[np.ndarray, ...]]
"""`(resolved config of the layer, outputs of each part) -> rows of each part`."""


@dataclass(frozen=True)
class Tensor:
    """One of their tensors and what it holds of ours.

    theirs: its name; `{layer}`, `{expert}` and `{head}` stand for numbers.
    ours: paths of our arrays in it, in the order in which the packing counts them.
    transposed: stored `[..., out, in]`, where ours is `[..., in, out]`.
    packing: rows of each part along their output axis; None for a single array.
    when: whether a layer of this config has it under this name; None is always.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    packing: Packing | None = None
    when: Callable[[ModelConfig], bool] | None = None

    @property
    def by_layer(self) -> bool:
        """Whether there is one of it for each layer."""
        return self.ours[0].startswith("layers/")

    @property
    def by_expert(self) -> bool:
        """Whether there is one of it for each expert (ours is stacked on its first axis)."""
        return "{expert}" in self.theirs

    @property
    def by_head(self) -> bool:
        """Whether there is one of it for each head (ours is all of them in a row)."""
        return "{head}" in self.theirs


def linear(
    theirs: str, *ours: str, packing: Packing | None = None, transposed: bool = True
) -> tuple[Tensor, ...]:
    """A linear layer: `.weight` `[out, in]` (torch's Linear) and, where ours has one, `.bias`."""
    kernels = tuple(f"{path}/kernel" for path in ours)
    biases = tuple(f"{path}/bias" for path in ours)
    return (
        Tensor(f"{theirs}.weight", kernels, transposed, packing),
        Tensor(f"{theirs}.bias", biases, packing=packing),
    )


def conv1d(theirs: str, *ours: str, packing: Packing | None = None) -> tuple[Tensor, ...]:
    """GPT-2's Conv1D: a linear layer whose weight is stored `[in, out]`, like ours."""
    return linear(theirs, *ours, packing=packing, transposed=False)


def norm(
    theirs: str, ours: str, when: Callable[[ModelConfig], bool] | None = None
) -> tuple[Tensor, ...]:
    """A norm: `.weight` and, where ours has one, `.bias`; under this name `when` that holds."""
    return (
        Tensor(f"{theirs}.weight", (f"{ours}/scale",), when=when),
        Tensor(f"{theirs}.bias", (f"{ours}/bias",), when=when),
    )


def table(theirs: str, ours: str) -> tuple[Tensor, ...]:
    """An embedding: `.weight` `[rows, d_model]`."""
    return (Tensor(f"{theirs}.weight", (f"{ours}/table",)),)


def contiguous(config: ModelConfig, sizes: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Part after part: `[query | key | value]`, `[gate | up]`."""
    ends = np.cumsum(sizes)
    return tuple(np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True))


def by_kv_head(config: ModelConfig, sizes: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Key head after key head: the rows of its queries, then of its key, then of its value.

    With as many key heads as query heads this is `[heads, 3, head_dim]` (GPT-NeoX, BLOOM);
    otherwise `[kv_heads, group + 2, head_dim]` (Falcon 40B, InternLM2).
    """
    heads, width = config.kv_heads, config.head_dim
    assert heads is not None
    assert width is not None
    rows = np.arange(sum(sizes)).reshape(heads, -1, width)
    parts = (rows[:, :-2], rows[:, -2], rows[:, -1])
    return tuple(part.reshape(-1) for part in parts)


def present(
    tensors: Sequence[Tensor], paths: frozenset[str], layer: ModelConfig
) -> tuple[Tensor, ...]:
    """The tensors that a layer with these array paths has (biases, heads, norms come and go)."""
    return tuple(
        tensor
        for tensor in tensors
        if all(path in paths for path in tensor.ours)
        and (tensor.when is None or tensor.when(layer))
    )


STRIP = 16
"""Rows that are turned at a time: strips of one or two cache lines at the other end."""


def copy_turned(into: np.ndarray, value: np.ndarray, turn: bool) -> None:
    """Copy a block, its last two axes exchanged if `turn`; strip by strip, to stay in the cache."""
    bits = np.dtype(f"u{into.itemsize}")  # NumPy copies bfloat16 number by number
    into, value = into.view(bits), value.view(bits)
    if not turn:
        into[...] = value
        return
    for first in range(0, value.shape[-2], STRIP):
        strip = value[..., first : first + STRIP, :]
        into[..., first : first + STRIP] = np.swapaxes(strip, -1, -2)
