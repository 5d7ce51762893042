"""The shapes that an engine compiles its step for, few enough that all are ready before it serves.

A step that only decodes has as many tokens as sequences, so one size decides both; a step with part
of a prompt in it takes the size of its tokens and room for all sequences. The width of the page
table matters only where attention gathers pages (a CPU); kernels read what a sequence has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serving.plan import ScheduledSequence
from serving.sampling import Variant
from serving.scheduler import SchedulerConfig
from serving.settings import EngineSettings, Resolved
from serving.step import Buckets, Step, pack

SMALLEST_CHUNK, SMALLEST_WIDTH, STEP_UP = 32, 16, 4
FLOOR, CPU_FLOOR = 256, 16
"""Tokens whose products take about as long as reading the weights that they are multiplied by."""


@dataclass(frozen=True)
class Shapes:
    """Buckets of steps that only decode, and of all others; and variants of the sampler.

    full: all that a request may ask of its answer; what nobody asks for is skipped as it runs.
    greedy: nothing of it, where skipping costs time. reads: also what is told of prompts.
    floor: a step costs at least what so many tokens cost, since it reads all weights.
    deterministic: there is one program, in which no sequence changes a bit of another's.
    """

    decode: Buckets
    mixed: Buckets
    page_size: int
    greedy: Variant
    full: Variant
    reads: Variant
    floor: int
    deterministic: bool = False

    def pack(self, sequences: Sequence[ScheduledSequence]) -> tuple[Step, Variant]:
        """A step's arrays and its sampler, in the smallest shape that holds it."""
        alone = (each.stop - each.start == 1 and not each.reads for each in sequences)
        decodes = all(alone) and not self.deterministic
        buckets = self.decode if decodes else self.mixed
        return self._pack(sequences, buckets, not decodes), self._variant(sequences, decodes)

    def _pack(self, sequences: Sequence[ScheduledSequence], buckets: Buckets, mixed: bool) -> Step:
        singly = self.deterministic
        return pack(sequences, buckets, self.page_size, mixed=mixed, token_by_token=singly)

    def _variant(self, sequences: Sequence[ScheduledSequence], decodes: bool) -> Variant:
        if not decodes:
            return self.reads
        asked = [sequence.request.params for sequence in sequences if sequence.samples]
        told = any(params.logprobs is not None or params.structured_outputs for params in asked)
        hot = any(params.temperature > 0.0 for params in asked)
        return self.full if told or hot else self.greedy

    def all(self) -> Iterator[tuple[Step, Variant]]:
        """Every program, as a step in which nothing is computed; the smallest first."""
        for size in () if self.deterministic else self.decode.sequences:
            variants = dict.fromkeys((self.greedy, self.full))
            yield from self._widths((size, size), False, tuple(variants))
        for tokens in self.mixed.tokens:
            sizes = (tokens, self.mixed.sequences[-1])
            yield from self._widths(sizes, True, (self.reads,))

    def limits(self, config: SchedulerConfig) -> SchedulerConfig:
        """The same limits of a step, with the sizes that it is padded to."""
        sizes, floor = self.mixed.tokens, self.floor
        more = {"max_num_batched_tokens": sizes[-1], "step_sizes": sizes, "step_floor": floor}
        return dataclasses.replace(config, **more)

    def largest(self) -> tuple[Step, Variant]:
        """The program that needs most memory."""
        return list(self.all())[-1]

    def _widths(
        self, sizes: tuple[int, int], mixed: bool, variants: Sequence[Variant]
    ) -> Iterator[tuple[Step, Variant]]:
        tokens, sequences = sizes
        for width in self.decode.pages:
            buckets = Buckets((tokens,), (sequences,), (width,))
            for variant in variants:
                yield self._pack((), buckets, mixed), variant


def choose_shapes(
    settings: EngineSettings, resolved: Resolved, platform: str, vocab_size: int
) -> Shapes:
    """The shapes of an engine; sizes that `settings` names are completed by the largest that may
    occur.

    vocab_size: ids from here on are never drawn.
    """
    slots, most = resolved.slots, resolved.scheduler.max_num_batched_tokens
    widest = resolved.pages_per_sequence
    on_cpu = platform == "cpu"
    floor = CPU_FLOOR if on_cpu else FLOOR
    widths = settings.page_widths or (_sizes(SMALLEST_WIDTH, widest) if on_cpu else (widest,))
    decodes = settings.decode_sizes or _sizes(1 if on_cpu else 8, slots, 2)
    chunks = settings.chunk_sizes or _sizes(SMALLEST_CHUNK, most)
    if settings.deterministic:
        widths = decodes = ()
        most = min(most, max(settings.chunk_sizes or (SMALLEST_CHUNK, floor, slots)))
        most = max(most, slots)
        chunks = (most,)
    decodes, chunks, widths = (
        _completed(sizes, largest)
        for sizes, largest in ((decodes, slots), (chunks, most), (widths, widest))
    )
    full = Variant(True, settings.max_logprobs, settings.processed_logprobs, vocab_size=vocab_size)
    # A device must stop to learn which branch to take; a CPU is there already.
    greedy = full if on_cpu else dataclasses.replace(full, draws=False, logprobs=None)
    return Shapes(
        decode=Buckets(decodes, decodes, widths),
        mixed=Buckets(chunks, (slots,), widths),
        page_size=resolved.page_size,
        greedy=greedy,
        full=full,
        reads=dataclasses.replace(full, reads=True),
        floor=floor,
        deterministic=settings.deterministic,
    )


def _sizes(least: int, most: int, factor: int = STEP_UP) -> tuple[int, ...]:
    sizes = []
    while least < most:
        sizes.append(least)
        least *= factor
    return (*sizes, most)


def _completed(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    return (*(size for size in sizes if size < most), most)
