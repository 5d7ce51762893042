"""What the readers and writers of packed layouts share: fields of bits in words, and checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from weights.tree import nearest


class LayoutError(ValueError):
    """Arrays or settings that are not those of a layout; names the key, what is there and what
    would be right.
    """


def unpack_bits(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Numbers of `bits` bits that lie without gaps along an axis of 32-bit words, the lowest bits
    of the first word first; one may begin in a word and end in the next.
    """
    words = np.moveaxis(np.ascontiguousarray(words).view(np.uint32), axis, 0).astype(np.uint64)
    count = len(words) * 32 // bits
    first = np.arange(count) * bits
    place, shift = first // 32, (first % 32).astype(np.uint64)
    shift = shift.reshape(-1, *[1] * (words.ndim - 1))
    ahead = np.concatenate([words[1:], np.zeros_like(words[:1])])
    pairs = words[place] | ahead[place] << np.uint64(32)
    numbers = pairs >> shift & np.uint64(2**bits - 1)
    return np.moveaxis(numbers.astype(np.uint8), 0, axis)


def pack_bits(numbers: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """The inverse of `unpack_bits`, as int32; the axis must fill whole words."""
    moved = np.moveaxis(numbers, axis, 0).astype(np.uint64) & np.uint64(2**bits - 1)
    if len(moved) * bits % 32:
        raise LayoutError(
            f"{len(moved)} codes of {bits} bits do not fill whole 32-bit words; "
            f"a multiple of {32 // np.gcd(32, bits)} does"
        )
    words = np.zeros((len(moved) * bits // 32 + 1, *moved.shape[1:]), np.uint64)
    for index, row in enumerate(moved):
        place, shift = divmod(index * bits, 32)
        spread = row << np.uint64(shift)
        words[place] |= spread & np.uint64(2**32 - 1)
        words[place + 1] |= spread >> np.uint64(32)
    packed = words[:-1].astype(np.uint32).view(np.int32)
    return np.ascontiguousarray(np.moveaxis(packed, 0, axis))


def take(
    arrays: Mapping[str, np.ndarray], wanted: Iterable[str], optional: Iterable[str] = ()
) -> None:
    """Raise `LayoutError` unless exactly these arrays are there."""
    known = [*wanted, *optional]
    for name in wanted:
        if name not in arrays:
            raise LayoutError(f"{name} is missing; there are {', '.join(sorted(arrays))}")
    for name in arrays:
        if name not in known:
            close = nearest(name, known) or ", ".join(known)
            raise LayoutError(f"{name} is not an array of this layout; nearest: {close}")


def check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise `LayoutError` for an array of another shape."""
    if array.shape != shape:
        raise LayoutError(f"{name} is {list(array.shape)}; the others make it {list(shape)}")


def setting(config: Mapping[str, Any], name: str, default: Any, known: Iterable[Any]) -> Any:
    """A setting, one of the known values; `LayoutError` names it otherwise."""
    value = config.get(name, default)
    if value not in list(known):
        shown = ", ".join(map(repr, known))
        raise LayoutError(f"quantization_config.{name} = {value!r}: must be {shown}")
    return value
