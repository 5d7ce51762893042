"""Which window comes when: pure integer arithmetic, so order is a function and not a state.

`permute` is a bijection on [0, n) in constant memory, `Mixture` says which component a draw
belongs to and how many of its draws came before, `Order` puts phases, mixtures, epochs and skipped
batches together. Nothing here reads data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

ROUNDS = 6
LEAST_WEIGHT = 10_000
LARGEST_TOTAL = 2**31 - 1

Ints = np.ndarray


def key(*parts: object) -> int:
    """A 64-bit key from any printable parts, e.g. `key(seed, "fiction", epoch)`."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: int | Ints, size: int | Ints, seed: int | Ints) -> int | Ints:
    """Where `index` goes under the permutation of [0, size) that the 64-bit key `seed` names.

    A balanced Feistel network of 6 rounds with murmur3's finaliser (Luby and Rackoff 1988), walked
    along its cycle until the value is below `size`. Arguments broadcast; Python ints give a Python
    int, arrays give int64.
    """
    return _walk(index, size, seed, range(ROUNDS))


def unpermute(index: int | Ints, size: int | Ints, seed: int | Ints) -> int | Ints:
    """The inverse of `permute`."""
    return _walk(index, size, seed, range(ROUNDS - 1, -1, -1))


def _walk(index: int | Ints, size: int | Ints, seed: int | Ints, rounds: range) -> int | Ints:
    scalar = all(np.ndim(argument) == 0 for argument in (index, size, seed))
    value, size, seed = np.broadcast_arrays(*(np.atleast_1d(x) for x in (index, size, seed)))
    if value.size and (np.min(value) < 0 or np.any(value >= size)):
        raise ValueError(f"permute: index {np.max(value)} is outside [0, {np.min(size)})")
    value, size, seed = value.astype(np.uint64), size.astype(np.uint64), seed.astype(np.uint64)
    half = np.array([_half_bits(int(n)) for n in np.unique(size)], np.uint64)
    half = half[np.searchsorted(np.unique(size), size)]
    value = _feistel(value, half, seed, rounds)
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], half[outside], seed[outside], rounds)
    return int(value[0]) if scalar else value.astype(np.int64)


def _half_bits(size: int) -> int:
    """Bits of each Feistel half: the smallest even-width domain that holds [0, size)."""
    return max(1, ((size - 1).bit_length() + 1) // 2)


def _feistel(value: Ints, half: Ints, seed: Ints, rounds: range) -> Ints:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in rounds:
        secret = _mix(
            (seed >> np.uint64(32)) ^ _mix((seed + np.uint64(number * 0x9E3779B9)) & _LOW)
        )
        if rounds.step > 0:
            left, right = right, left ^ (_mix(right ^ secret) & mask)
        else:
            left, right = right ^ (_mix(left ^ secret) & mask), left
    return (left << half) | right


_LOW = np.uint64(0xFFFFFFFF)


def _mix(x: Ints) -> Ints:
    """murmur3's 32-bit finaliser, in uint64 arrays whose high half stays zero."""
    x = x & _LOW
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & _LOW
    x = ((x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & _LOW
    return x ^ (x >> np.uint64(16))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Integer weights, and the closed form of which component a draw belongs to (Grain's rule).

    For draw k, with K = k and R = sum(p): for each i, K' = floor(K (R - p_i) / R), count_i(k) = K
    - K', then K = K' and R = R - p_i. Draw k belongs to the one i whose count grows between k and
    k + 1.
    """

    weights: tuple[int, ...]

    @staticmethod
    def from_floats(weights: Sequence[float]) -> Mixture:
        """Scale so that the least positive weight is 10,000 or more, and round; 0 takes no
        draws.
        """
        if not weights or any(not math.isfinite(weight) or weight < 0 for weight in weights):
            raise ValueError(f"mixture weights {tuple(weights)} must be finite and not negative")
        positive = [weight for weight in weights if weight > 0]
        if not positive:
            raise ValueError(f"mixture weights {tuple(weights)}: at least one must be above 0")
        scale = max(1.0, LEAST_WEIGHT / min(positive))
        integers = tuple(round(weight * scale) for weight in weights)
        if sum(integers) > LARGEST_TOTAL:
            raise ValueError(
                f"mixture weights {tuple(weights)}: the least is below "
                f"1/{LARGEST_TOTAL // LEAST_WEIGHT:,} of the sum; raise it, or set it to 0"
            )
        return Mixture(integers)

    def counts(self, draws: int | Ints) -> Ints:
        """How many of the first `draws` draws went to each component: `int64[..., components]`."""
        left = np.asarray(draws, np.int64)
        total = sum(self.weights)
        columns = []
        for weight in self.weights:
            # floor(K (R - p) / R) without overflow: K = q R + r, and r (R - p) < 2^62.
            quotient, remainder = np.divmod(left, max(total, 1))
            kept = quotient * (total - weight) + remainder * (total - weight) // max(total, 1)
            columns.append(left - kept)
            left, total = kept, total - weight
        return np.stack(columns, axis=-1)

    def component(self, draws: int | Ints) -> tuple[Ints, Ints]:
        """`(component, index within it)` of each draw, int64 arrays of the shape of `draws`."""
        draws = np.asarray(draws, np.int64)
        before, after = self.counts(draws), self.counts(draws + 1)
        chosen = np.argmax(after - before, axis=-1)
        return chosen, np.take_along_axis(before, chosen[..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training with one mixture: batches [start, start of the next phase)."""

    start: int
    mixture: Mixture


@dataclasses.dataclass(frozen=True)
class Order:
    """The draw of every (batch, row): a pure function of phases, batch size and the batches
    skipped.

    A component's index runs on across phases, so a new phase does not start its sources again.
    `skips` are half-open ranges of batch numbers that are never trained on; steps count only what
    is trained on.
    """

    phases: tuple[Phase, ...]
    batch_size: int
    skips: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        starts = [phase.start for phase in self.phases]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"phases must start at batch 0 and then grow, they start at {starts}")
        object.__setattr__(self, "skips", merge_ranges(self.skips))

    def batch_index(self, step: int) -> int:
        """The batch that training step `step` reads: `step` plus the batches skipped before it."""
        index = step
        for start, stop in self.skips:
            if index >= start:
                index += stop - start
        return index

    def skip(self, start: int, stop: int) -> Order:
        """The same order without batches [start, stop)."""
        if not 0 <= start < stop:
            raise ValueError(f"cannot skip batches [{start}, {stop}): need 0 <= start < stop")
        return dataclasses.replace(self, skips=(*self.skips, (start, stop)))

    def draws(self, step: int, rows: Ints) -> tuple[Ints, Ints]:
        """`(component, index)` of rows of a step's batch, index counting from the start of the
        run.
        """
        batch = self.batch_index(step)
        number = max(i for i, phase in enumerate(self.phases) if phase.start <= batch)
        phase = self.phases[number]
        component, index = phase.mixture.component(
            (batch - phase.start) * self.batch_size + np.asarray(rows, np.int64)
        )
        return component, index + self._drawn_before(number)[component]

    def drawn(self, batches: int) -> Ints:
        """Windows drawn from each component by the first `batches` batches: `int64[components]`."""
        number = max(i for i, phase in enumerate(self.phases) if phase.start <= batches)
        phase = self.phases[number]
        inside = phase.mixture.counts((batches - phase.start) * self.batch_size)
        return self._drawn_before(number) + inside

    def _drawn_before(self, number: int) -> Ints:
        total = np.zeros(len(self.phases[0].mixture.weights), np.int64)
        for phase, following in zip(self.phases[:number], self.phases[1 : number + 1], strict=True):
            total += phase.mixture.counts((following.start - phase.start) * self.batch_size)
        return total


def merge_ranges(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted, disjoint ranges that cover the same integers."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(a), int(b)) for a, b in ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)
