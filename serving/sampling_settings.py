"""The settings of requests as arrays, a row a slot: what `serving/sampling.py` reads.

A request's row is made once, as it is admitted; the steps that follow send no settings.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from serving.checks import ParameterError
from serving.sampling_params import SamplingParams

ANY = -2
"""Fills a short banned word in front: any token, or none, may stand there."""
NONE = -1
"""Fills unused places."""


@dataclass(frozen=True)
class Room:
    """Most that one request may have of what is listed.

    biases: entries of `logit_bias`. ends: ids that are no end before `min_tokens`. words: token
    sequences of `bad_words`. word_tokens: tokens of one.
    """

    biases: int = 1024
    ends: int = 64
    words: int = 64
    word_tokens: int = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """One row a slot (or none, for a single request); see `SamplingParams` for the meanings.

    temperature, min_p, top_p, repetition_penalty, presence_penalty, frequency_penalty: float32.
    top_k, choice, prompt_lengths, min_tokens: int32.
    seed: uint32[…, 2], high word first.
    allowed: uint32[…, ceil(vocab / 32)], a bit an id.
    bias_ids, bias_values: int32 and float32[…, biases].
    ends: int32[…, ends].
    words: int32[…, words, word_tokens]; the last token of each is the forbidden one.
    adjusts: whether anything but the temperature changes its logits before they are restricted.
    restricts: whether min-p, top-k or top-p does.
    logprobs: whether log-probabilities are asked for.
    """

    temperature: Any
    min_p: Any
    top_k: Any
    top_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    seed: Any
    choice: Any
    prompt_lengths: Any
    min_tokens: Any
    allowed: Any
    bias_ids: Any
    bias_values: Any
    ends: Any
    words: Any
    adjusts: Any
    restricts: Any
    logprobs: Any


DEFAULT_ROOM = Room()


def settings_of(
    params: SamplingParams,
    vocab_size: int,
    *,
    prompt_length: int = 0,
    choice: int = 0,
    end_ids: Collection[int] = (),
    banned: Sequence[Sequence[int]] = (),
    room: Room = DEFAULT_ROOM,
) -> Settings:
    """One request's settings, NumPy arrays without a row axis.

    Args:
        params: the request's; with a seed, unless greedy.
        vocab_size: width of the model's logits.
        prompt_length: tokens of the prompt.
        choice: which of the request's `n` answers.
        end_ids: the model's end-of-text tokens.
        banned: token sequences of `bad_words`.
        room: what the arrays hold.

    Raises `ParameterError` that names the field for more than there is room for, or a missing seed.
    """
    if params.seed is None and params.temperature > 0.0:
        raise ParameterError("seed", "is not set", "drawn before a request is sampled")
    _check_words(banned, room)
    words = [[ANY] * (room.word_tokens - len(word)) + list(word) for word in banned]
    penalties = (params.presence_penalty, params.frequency_penalty)
    lists = (params.logit_bias, words, params.allowed_token_ids is not None)
    adjusts = any(lists) or any(penalties) or params.repetition_penalty != 1.0
    return Settings(
        temperature=np.float32(params.temperature),
        min_p=np.float32(params.min_p),
        top_k=np.int32(min(max(params.top_k, 0), vocab_size)),
        top_p=np.float32(params.top_p),
        repetition_penalty=np.float32(params.repetition_penalty),
        presence_penalty=np.float32(params.presence_penalty),
        frequency_penalty=np.float32(params.frequency_penalty),
        seed=_key(params.seed or 0),
        choice=np.int32(choice),
        prompt_lengths=np.int32(prompt_length),
        min_tokens=np.int32(params.min_tokens),
        allowed=_bitmask(params.allowed_token_ids, vocab_size),
        bias_ids=_filled("logit_bias", list(params.logit_bias), room.biases, np.int32),
        bias_values=_filled(
            "logit_bias", list(params.logit_bias.values()), room.biases, np.float32
        ),
        ends=_filled("stop_token_ids", _early_ends(params, end_ids), room.ends, np.int32),
        words=_filled("bad_words", words, room.words, np.int32, (room.word_tokens,)),
        adjusts=np.bool_(adjusts or params.min_tokens > 0),
        restricts=np.bool_(params.min_p > 0.0 or params.top_k > 0 or params.top_p < 1.0),
        logprobs=np.bool_(params.logprobs is not None),
    )


def _early_ends(params: SamplingParams, end_ids: Collection[int]) -> list[int]:
    """Ids that end the answer, if there is a length before which they may not."""
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else end_ids)}
    return sorted(ends) if params.min_tokens else []


def empty_settings(slots: int, vocab_size: int, room: Room = DEFAULT_ROOM) -> Settings:
    """Settings of slots that nobody uses: greedy."""
    row = settings_of(SamplingParams(temperature=0.0), vocab_size, room=room)
    return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (slots, *np.shape(leaf))), row)


def _key(seed: int) -> np.ndarray:
    """The two words of `jax.random.key(seed)` for a seed of 64 bits."""
    seed &= (1 << 64) - 1
    return np.asarray([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def _bitmask(ids: Sequence[int] | None, vocab_size: int) -> np.ndarray:
    words = np.full(-(-vocab_size // 32), 0xFFFFFFFF if ids is None else 0, np.uint32)
    for token in ids or ():
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


def _filled(name: str, given: list[Any], size: int, dtype: Any, each: tuple[int, ...] = ()) -> Any:
    if len(given) > size:
        raise ParameterError(name, f"has {len(given)} entries", f"at most {size} on this server")
    rows = np.full((size, *each), NONE, dtype)
    if given:
        rows[: len(given)] = given
    return rows


def _check_words(banned: Sequence[Sequence[int]], room: Room) -> None:
    longest = max(map(len, banned), default=0)
    if longest > room.word_tokens:
        raise ParameterError(
            "bad_words",
            f"has a word of {longest} tokens",
            f"words of at most {room.word_tokens} tokens on this server",
        )
