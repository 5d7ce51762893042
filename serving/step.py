"""One compiled step of the engine: a flat batch of tokens through the model, and the next token of
each sequence that is complete.

The device keeps what it needs from step to step in a `State`: pages of keys and values, the tokens
of each slot and the settings of its request. So a step's tokens never come from the host, which
sends a few integers a sequence (`pack`), and the next step can be sent before this one is read.
Shapes come from `Buckets`, so that few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.target import current_target
from model import ModelConfig, Runtime, hidden_states, logits
from model.caches import PagedCache, init_paged_cache, paged_step
from model.segments import segments_of
from serving.plan import ScheduledSequence
from serving.reading import read_prompts
from serving.sampling import Rows, Sampled, Variant, sample
from serving.sampling_settings import DEFAULT_ROOM, Room, Settings, empty_settings
from weights import low_rank_bank

Array = jax.Array


@dataclass(frozen=True)
class Buckets:
    """Sizes that steps are compiled for, each rising; a step takes the smallest that hold it.

    tokens: of the flat batch. sequences: in it. pages: of its longest sequence.
    """

    tokens: tuple[int, ...]
    sequences: tuple[int, ...]
    pages: tuple[int, ...]

    @classmethod
    def up_to(cls, tokens: int, sequences: int, pages: int) -> Buckets:
        """Powers of two from 16 tokens, 8 sequences and 1 page on, and these largest sizes."""
        firsts = ((16, tokens), (8, sequences), (1, pages))
        return cls(*(_powers(least, most) for least, most in firsts))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """A step as the device gets it, made by `pack`; sequences that are not there have no slot.

    slots: int32[sequences], row of the state; -1 for none.
    kv_lens: int32[sequences], tokens of each sequence after the step.
    cu_q_lens: int32[sequences + 1], first token of each in the flat batch.
    samples: bool[sequences], whose next token is drawn.
    page_table: int32[sequences, width].
    scores: bool[sequences], whose prompt's tokens get log-probabilities; None is nobody's.
    tokens: size of the flat batch.
    decodes: every sequence brings one token.
    adapters: int32[sequences], the number of each sequence's adapter, 0 for none; None is none.
    token_by_token: see `model.caches.paged.PagedStep`.
    """

    slots: Any
    kv_lens: Any
    cu_q_lens: Any
    samples: Any
    page_table: Any
    tokens: int = dataclasses.field(metadata={"static": True})
    decodes: bool = dataclasses.field(metadata={"static": True})
    adapters: Any = None
    scores: Any = None
    token_by_token: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What stays on the device; each step takes it and gives it back, in the same memory.

    cache: pages of all layers.
    tokens: int32[slots, max_length], prompt and generated tokens of each slot.
    seen: int32[slots, vocab], twice how often a token was generated, and 1 more if in the prompt.
    settings: of each slot.
    """

    cache: PagedCache
    tokens: Array
    seen: Array
    settings: Settings


def init_state(
    params: Mapping[str, Any],
    config: ModelConfig,
    runtime: Runtime,
    *,
    slots: int,
    max_length: int,
    pages: int,
    page_size: int,
    dtype: Any = None,
    room: Room = DEFAULT_ROOM,
) -> State:
    """An empty state.

    Args:
        params: the model's; layers may be apart (`model.layers_apart`).
        config: what the model is.
        runtime: how it runs.
        slots: most sequences at once.
        max_length: most tokens of a sequence; rotary scalings that depend on it go by it.
        pages, page_size: room for keys and values, in pages of so many tokens.
        dtype: of stored keys and values; None is the compute dtype, or float32 on a CPU, which
            would widen all pages of bfloat16 at each step.
        room: most banned words and the like of one request.

    Raises `ValueError` for more tokens than the model has learned positions for.
    """
    if config.positions == "learned" and max_length > config.max_length:
        raise ValueError(
            f"max_length is {max_length}; the model has {config.max_length} learned positions"
        )
    cache = init_paged_cache(
        config,
        pages,
        page_size,
        planned_length=max_length,
        dtype=dtype or ("float32" if current_target().platform == "cpu" else runtime.compute_dtype),
        layout=runtime.layout,
        segments=segments_of(params, config),
    )
    tokens, seen = (jnp.zeros((slots, size), jnp.int32) for size in (max_length, config.vocab_size))
    settings = jax.tree.map(jnp.array, empty_settings(slots, config.vocab_size, room))
    return State(cache, tokens, seen, settings)


def admit(state: State, slot: int, tokens: Sequence[int], settings: Settings) -> State:
    """The state with a request in a slot; the one given is gone (donated).

    tokens: its prompt, and what was generated before it lost its pages, if it did. settings: its
    row (`settings_of`), with the length of the prompt. Raises `ValueError` for more tokens than a
    slot has room for.
    """
    slots, size = state.tokens.shape
    if len(tokens) > size or not 0 <= slot < slots:
        raise ValueError(
            f"{len(tokens)} tokens for slot {slot}; there are slots 0..{slots - 1} of {size} tokens"
        )
    row = np.zeros(size, np.int32)
    row[: len(tokens)] = tokens
    return _admit(state, np.int32(slot), row, np.int32(len(tokens)), settings)


def pack(
    sequences: Sequence[ScheduledSequence],
    buckets: Buckets,
    page_size: int,
    *,
    mixed: bool = False,
    token_by_token: bool = False,
) -> Step:
    """The arrays of a step, NumPy, in the smallest buckets that hold it.

    mixed: compile no program for steps that only decode. token_by_token: see `Step`. Raises
    `ValueError` for a step that no bucket holds, or a sequence whose pages do not hold it.
    """
    counts = [sequence.stop - sequence.start for sequence in sequences]
    _check(sequences, page_size)
    count = len(sequences)
    size = bucket_of("sequences", len(sequences), buckets.sequences)
    widest = max((len(sequence.pages) for sequence in sequences), default=1)
    width = bucket_of("pages", widest, buckets.pages)
    slots, samples = np.full(size, -1, np.int32), np.zeros(size, bool)
    scores = np.zeros(size, bool)
    kv_lens, ends = np.zeros(size, np.int32), np.full(size + 1, sum(counts), np.int32)
    ends[0] = 0
    ends[1 : count + 1] = np.cumsum(counts)
    slots[:count] = [sequence.slot for sequence in sequences]
    kv_lens[:count] = [sequence.stop for sequence in sequences]
    samples[:count] = [sequence.samples for sequence in sequences]
    scores[:count] = [each.reads and each.request.scores_prompt for each in sequences]
    table, adapters = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
    adapters[:count] = [sequence.request.adapter_id for sequence in sequences]
    for row, sequence in zip(table, sequences, strict=False):
        row[: len(sequence.pages)] = sequence.pages
    tokens = bucket_of("tokens", sum(counts), buckets.tokens)
    decodes = not mixed and max(counts, default=1) == 1
    arrays = (slots, kv_lens, ends, samples, table)
    return Step(*arrays, tokens, decodes, adapters, scores, token_by_token)


@functools.partial(
    jax.jit, static_argnames=("config", "runtime", "variant"), donate_argnames="state"
)
def run_step(
    params: Mapping[str, Any],
    state: State,
    step: Step,
    grammar: Array | None = None,
    *,
    config: ModelConfig,
    runtime: Runtime,
    variant: Variant,
) -> tuple[State, Sampled]:
    """The state after a step, and a row for each of its sequences; rows of those that do not sample
    mean nothing.

    grammar: `uint32` of `mask_shape`, a bit for each id that may come next; None allows all. The
    state given is gone (donated).
    """
    size = jax.tree.leaves(state.cache.segments)[0].shape[2]
    plan = paged_step(
        step.page_table,
        step.kv_lens,
        step.cu_q_lens,
        page_size=size,
        tokens=step.tokens,
        max_query_length=1 if step.decodes else None,
        token_by_token=step.token_by_token,
    )
    slots, places = jnp.maximum(step.slots, 0)[plan.owners], plan.positions[:, 0]
    ids = state.tokens[slots, places]
    adapters = jnp.zeros_like(step.slots) if step.adapters is None else step.adapters
    hidden, aux = hidden_states(
        low_rank_bank.choose(params, adapters[plan.owners][:, None]),
        ids[:, None],
        config,
        runtime,
        cache=dataclasses.replace(state.cache, plan=plan),
        segment_ids=plan.valid.astype(jnp.int32),
    )

    def head(rows: Array, numbers: Array) -> Array:
        chosen = low_rank_bank.choose(params, numbers[:, None])
        return logits(chosen, rows[:, None], config, runtime)[:, 0]

    scores = head(hidden[jnp.maximum(plan.cu_q_lens[1:] - 1, 0), 0], adapters)
    sampled = sample(scores, _rows(state, step.slots, plan.kv_lens), variant, grammar)
    if variant.reads:
        following = state.tokens[slots, jnp.minimum(places + 1, state.tokens.shape[1] - 1)]
        tokens = (hidden[:, 0], following, adapters[plan.owners])
        read = read_prompts(tokens, plan, step.scores, head, variant)
        sampled = dataclasses.replace(sampled, read=read)
    state = dataclasses.replace(state, cache=aux["cache"])
    return _written(state, step, sampled.tokens), sampled


def mask_shape(step: Step, vocab_size: int) -> tuple[int, int]:
    """`(sequences, ceil(vocab / 32))`."""
    return len(step.slots), -(-vocab_size // 32)


def bucket_of(name: str, count: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds so many. Raises `ValueError` if none does."""
    for size in sizes:
        if count <= size:
            return size
    raise ValueError(f"a step of {count} {name}; the largest bucket is {max(sizes)}")


@functools.partial(jax.jit, donate_argnames="state")
def _admit(state: State, slot: Array, tokens: Array, length: Array, settings: Settings) -> State:
    vocab, place = state.seen.shape[1], jnp.arange(len(tokens))
    prompt = place < settings.prompt_lengths
    row = jnp.zeros(vocab, jnp.int32).at[jnp.where(prompt, tokens, vocab)].max(1, mode="drop")
    generated = ~prompt & (place < length)
    row = row.at[jnp.where(generated, tokens, vocab)].add(2, mode="drop")
    return State(
        state.cache,
        state.tokens.at[slot].set(tokens),
        state.seen.at[slot].set(row),
        jax.tree.map(lambda all, one: all.at[slot].set(one), state.settings, settings),
    )


def _rows(state: State, slots: Array, positions: Array) -> Rows:
    slots = jnp.maximum(slots, 0)
    settings = jax.tree.map(lambda leaf: leaf[slots], state.settings)
    back = settings.words.shape[2] - 1
    places = positions[:, None] - back + jnp.arange(back, dtype=jnp.int32)
    recent = state.tokens[slots[:, None], jnp.maximum(places, 0)]
    recent = jnp.where(places >= settings.prompt_lengths[:, None], recent, -1)
    return Rows(settings, positions, recent, state.seen, slots)


def _written(state: State, step: Step, tokens: Array) -> State:
    """With the sampled tokens of the sequences that sample; the others' go nowhere."""
    rows = jnp.where(step.samples & (step.slots >= 0), step.slots, len(state.tokens))
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, step.kv_lens].set(tokens, mode="drop"),
        seen=state.seen.at[rows, tokens].add(2, mode="drop"),
    )


def _powers(least: int, most: int) -> tuple[int, ...]:
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(sizes[-1] * 2)
    return (*(size for size in sizes if size < most), most)


def _check(sequences: Sequence[ScheduledSequence], page_size: int) -> None:
    for sequence in sequences:
        room = len(sequence.pages) * page_size
        if not 0 <= sequence.start < sequence.stop <= room:
            raise ValueError(
                f"slot {sequence.slot}: positions {sequence.start} to {sequence.stop} in "
                f"{len(sequence.pages)} pages, which hold {room}"
            )
