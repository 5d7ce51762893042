"""How an engine runs: `EngineSettings`, and what of it follows from the model and its device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from model import ModelConfig
from serving.prompt_out import POOLINGS, Pooling
from serving.queue import Policy
from serving.sampling_settings import DEFAULT_ROOM, Room
from serving.scheduler import SchedulerConfig

UNLIMITED = 2**31


@dataclass(frozen=True)
class EngineSettings:
    """What a deployer chooses; None is left to the engine.

    model_name: what the model is called; None is the name of its folder.
    max_model_len: most tokens of prompt and answer; None is the model's `max_length`.
    max_num_seqs: most requests that run at once; None is 16 on a CPU, 256 elsewhere.
    max_num_batched_tokens: most tokens of a step; fewer make long prompts stall others less.
    long_prefill_token_threshold: most tokens of one request in a step; 0 is no limit.
    max_waiting: most requests in the queue.
    policy: who goes first, "fcfs", "priority" (lower number) or "lpm" (longest cached prefix).
    watermark: the fraction of pages that admissions leave free.
    prefix_caching: share pages of equal prefixes.
    page_size: tokens of a page; None is 16, on a TPU 128.
    num_pages: room for keys and values; None is what the memory holds.
    kv_cache_bytes: that memory on a CPU.
    memory_fraction: of an accelerator's memory, what the engine may take.
    compute_dtype: of activations and products; None is float32 on a CPU, bfloat16 elsewhere.
    kv_dtype: of stored keys and values; None is float32 on a CPU, else the compute type.
    deterministic: what a request gets does not depend on what else runs, to the bit, in any type of
        number: all steps are of one shape, of the largest of `chunk_sizes` if given, and prompts
        take longer.
    async_scheduling: send a step before the last one is read; the text is the same.
    warm_up: compile and run every shape before the engine is ready.
    decode_sizes: most sequences of a step that only decodes, one program each; empty chooses.
    chunk_sizes: most tokens of a step with a prompt in it, likewise.
    page_widths: most pages of the longest sequence of a step, likewise.
    max_logprobs: most likeliest tokens that a request may ask for.
    processed_logprobs: log-probabilities of what was drawn from, rather than of the model; those of
        prompts are always the model's.
    pooling: what a text's vector is: the "mean" of its tokens' hidden states, or the "last" one;
        None is what the checkpoint says, or else the mean.
    queue_timeout_s: a request that waited so long ends with an error; None is never.
    request_timeout_s: one that took so long ends with what it has; None is never.
    watchdog_s: with a step that takes longer the engine counts as dead.
    room: most banned words, biases and the like of a request.
    """

    model_name: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    max_waiting: int = 1024
    policy: Policy = "fcfs"
    watermark: float = 0.01
    prefix_caching: bool = True
    page_size: int | None = None
    num_pages: int | None = None
    kv_cache_bytes: int = 1 << 30
    memory_fraction: float = 0.9
    compute_dtype: str | None = None
    kv_dtype: str | None = None
    deterministic: bool = False
    async_scheduling: bool = True
    warm_up: bool = True
    decode_sizes: tuple[int, ...] = ()
    chunk_sizes: tuple[int, ...] = ()
    page_widths: tuple[int, ...] = ()
    max_logprobs: int = 20
    processed_logprobs: bool = False
    pooling: Pooling | None = None
    queue_timeout_s: float | None = None
    request_timeout_s: float | None = None
    watchdog_s: float = 300.0
    room: Room = DEFAULT_ROOM

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "page_size", "num_pages"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or None")
        for name in ("queue_timeout_s", "request_timeout_s"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0, or None for no limit")
        for name in ("max_waiting", "kv_cache_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ValueError(f"memory_fraction is {self.memory_fraction}; it must be in (0, 1]")
        if self.pooling not in (None, *POOLINGS):
            known = ", ".join(POOLINGS)
            raise ValueError(f"pooling is {self.pooling!r}; it must be one of {known}")
        if self.max_logprobs < 0:
            raise ValueError(f"max_logprobs is {self.max_logprobs}; it must be 0 or more")
        for name in ("decode_sizes", "chunk_sizes", "page_widths"):
            sizes = getattr(self, name)
            if sizes and (sizes[0] < 1 or list(sizes) != sorted(set(sizes))):
                raise ValueError(f"{name} is {sizes}; it must rise from 1 or more")


@dataclass(frozen=True)
class Resolved:
    """What an engine of one model on one device runs with.

    scheduler: limits of a step and of the queue; the other fields are those of `EngineSettings`.
    """

    max_model_len: int
    page_size: int
    compute_dtype: str
    kv_dtype: str
    scheduler: SchedulerConfig

    @property
    def slots(self) -> int:
        """Most requests that run at once."""
        return self.scheduler.max_num_seqs

    @property
    def pages_per_sequence(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_model_len // self.page_size)


def resolve_settings(settings: EngineSettings, config: ModelConfig, platform: str) -> Resolved:
    """What `settings` leaves open, for a model on "cpu", "gpu" or "tpu".

    Raises `ValueError` for settings that do not fit each other or the model.
    """
    on_cpu = platform == "cpu"
    longest = settings.max_model_len or config.max_length
    if config.positions == "learned" and longest > config.max_length:
        raise ValueError(
            f"max_model_len is {longest}; the model has {config.max_length} learned positions"
        )
    compute = settings.compute_dtype or ("float32" if on_cpu else "bfloat16")
    # A CPU would widen all pages of bfloat16 at each step.
    stored = settings.kv_dtype or ("float32" if on_cpu else compute)
    slots = settings.max_num_seqs or (16 if on_cpu else 256)
    own = {field.name for field in dataclasses.fields(SchedulerConfig)}
    both = own & {field.name for field in dataclasses.fields(EngineSettings)}
    given = {name: getattr(settings, name) for name in both}
    return Resolved(
        max_model_len=longest,
        page_size=settings.page_size or (128 if platform == "tpu" else 16),
        compute_dtype=str(jnp.dtype(compute)),
        kv_dtype=str(jnp.dtype(stored)),
        # The engine counts who waits as requests arrive; preempted ones always find a place.
        scheduler=SchedulerConfig(**{**given, "max_num_seqs": slots, "max_waiting": UNLIMITED}),
    )
