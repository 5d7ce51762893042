"""What a request asks of sampling and of its end: `SamplingParams`, checked field by field.

The meanings are those of OpenAI's API with the fields that vLLM adds; the order in which the
sampler applies them stands in `serving/sampling.py`. No JAX here: a server checks a request before
any device sees it.
"""

from __future__ import annotations

import dataclasses
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.checks import ParameterError, integer, number, refuse, strings, token_ids
from serving.structured import StructuredOutputs

if TYPE_CHECKING:
    from data.tokenizers import Tokenizer

LEAST_TEMPERATURE = 0.01
MAX_CHOICES, MAX_STOPS, MAX_BIASES, MAX_BIAS, MAX_SALT = 128, 32, 1024, 100.0, 1024
_FLAGS = (
    "include_stop_str_in_output",
    "ignore_eos",
    "echo",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn and where they end.

    temperature: divides the logits; 0 takes the most likely token; below 0.01 it is raised to it.
    top_p: the most likely tokens whose probabilities reach p in sum.
    top_k: the k most likely tokens; 0 or -1 is all.
    min_p: tokens at least this fraction as likely as the most likely one.
    repetition_penalty: divides positive and multiplies negative logits of tokens of prompt or text.
    presence_penalty, frequency_penalty: taken off the logits of generated tokens, once or by count.
    logit_bias: added to the logits of ids, clipped to +-100; keys may be integer strings.
    allowed_token_ids: only these ids, if given.
    bad_words: texts that must not be generated.
    seed: int64; None or -1 lets the engine draw one.
    n: answers to return. best_of: answers to draw, of which the likeliest n return; None is n.
    max_tokens: most tokens to generate; None is what the context leaves; 0 only with `echo`.
    min_tokens: no end-of-text token, stop id or stop string before so many tokens.
    stop: texts that end the answer. include_stop_str_in_output: keep that text.
    stop_token_ids: ids that end the answer. ignore_eos: end-of-text tokens do not.
    logprobs: return the chosen token's log-probability and those of this many likeliest; None none.
    structured_outputs: the form that the answer must have, or an object with the fields of one.
    echo: return the prompt before the answer.
    suffix: text that follows the answer, for models that fill in the middle.
    truncate_prompt_tokens: keep so many tokens of the prompt; -1 is as many as fit.
    truncation_side: which end of the prompt goes, "left" or "right".
    priority: lower goes first, where the scheduler's policy is "priority".
    cache_salt: only requests with the same salt share cached pages.
    skip_special_tokens: leave special tokens out of the text.
    spaces_between_special_tokens: taken for other servers' clients; changes nothing, as with every
        fast tokenizer.

    Lists are kept as tuples without repetitions.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    echo: bool = False
    suffix: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"
    priority: int = 0
    cache_salt: str | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_distribution()
        self._check_tokens()
        self._check_end()
        self._check_rest()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_distribution(self) -> None:
        temperature = number("temperature", self.temperature, 0.0, 2.0)
        if 0.0 < temperature < LEAST_TEMPERATURE:
            warnings.warn(
                f"temperature {temperature} is raised to {LEAST_TEMPERATURE}; less may overflow",
                stacklevel=4,
            )
            temperature = LEAST_TEMPERATURE
        self._set("temperature", temperature)
        self._set("top_p", number("top_p", self.top_p, 0.0, 1.0, least_excluded=True))
        self._set("top_k", max(integer("top_k", self.top_k, -1), 0))
        self._set("min_p", number("min_p", self.min_p, 0.0, 1.0))
        penalty = number("repetition_penalty", self.repetition_penalty, 0.0, least_excluded=True)
        self._set("repetition_penalty", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, number(name, getattr(self, name), -2.0, 2.0))
        seed = self.seed
        if seed is not None:
            seed = integer("seed", seed, -(2**63), 2**63 - 1)
        self._set("seed", None if seed == -1 else seed)

    def _check_tokens(self) -> None:
        self._set("logit_bias", _biases(self.logit_bias))
        allowed = self.allowed_token_ids
        if allowed is not None:
            allowed = token_ids("allowed_token_ids", allowed)
            if not allowed:
                refuse("allowed_token_ids", allowed, "at least one id, or null for all")
        self._set("allowed_token_ids", allowed)
        self._set("bad_words", strings("bad_words", self.bad_words))
        self._set("structured_outputs", StructuredOutputs.of(self.structured_outputs))

    def _check_end(self) -> None:
        if self.max_tokens is not None:
            integer("max_tokens", self.max_tokens, 0)
            if self.max_tokens == 0 and not self.echo:
                refuse("max_tokens", 0, "at least 1; 0 only with echo")
        integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            refuse("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        self._set("stop", strings("stop", self.stop, MAX_STOPS))
        self._set("stop_token_ids", token_ids("stop_token_ids", self.stop_token_ids))

    def _check_rest(self) -> None:
        integer("n", self.n, 1, MAX_CHOICES)
        if self.best_of is not None:
            integer("best_of", self.best_of, self.n, MAX_CHOICES)
        if self.logprobs is not None:
            integer("logprobs", self.logprobs, 0)
        kept = self.truncate_prompt_tokens
        if kept is not None and integer("truncate_prompt_tokens", kept, -1) == 0:
            refuse("truncate_prompt_tokens", 0, "at least 1, or -1 to fit the context")
        if self.truncation_side not in ("left", "right"):
            refuse("truncation_side", self.truncation_side, '"left" or "right"')
        integer("priority", self.priority, -(2**31), 2**31 - 1)
        for name in ("suffix", "cache_salt"):
            if not isinstance(getattr(self, name), str | None):
                refuse(name, getattr(self, name), "a string or null")
        if self.cache_salt is not None and not 1 <= len(self.cache_salt) <= MAX_SALT:
            what = f"1 to {MAX_SALT} characters"
            raise ParameterError("cache_salt", f"has {len(self.cache_salt)} characters", what)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                refuse(name, getattr(self, name), "true or false")

    @property
    def candidates(self) -> int:
        """Answers to compute: `best_of` or `n`, and one where all would be equal."""
        return 1 if self.temperature == 0.0 else (self.best_of or self.n)


@dataclass(frozen=True)
class Limits:
    """What a model and its engine allow a request.

    vocab_size: ids are below it. max_model_len: most tokens of prompt and answer together.
    max_logprobs: most likeliest tokens to return. prioritises: the policy is "priority".
    fills_in_middle: the model has tokens for a suffix.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int = 20
    prioritises: bool = False
    fills_in_middle: bool = False


def truncate(prompt: Sequence[int], params: SamplingParams, limits: Limits) -> Sequence[int]:
    """The part of a prompt's ids that `truncate_prompt_tokens` keeps."""
    kept = params.truncate_prompt_tokens
    if kept is None:
        return prompt
    if kept == -1:
        answer = 1 if params.max_tokens is None else params.max_tokens
        kept = max(limits.max_model_len - answer, 1)
    return prompt[-kept:] if params.truncation_side == "left" else prompt[:kept]


def resolve(
    params: SamplingParams,
    prompt_length: int,
    limits: Limits,
    draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
) -> SamplingParams:
    """The same request with `max_tokens` and `seed` set, for a prompt of so many tokens.

    Raises `ParameterError` for what this model or engine does not allow, with code
    `context_length_exceeded` where prompt and answer are longer than the context.
    """
    _check_against(params, limits)
    room = limits.max_model_len - prompt_length
    wanted = max(room, 1) if params.max_tokens is None else params.max_tokens
    if wanted > room:
        raise ParameterError(
            "max_tokens" if room > 0 else "prompt",
            f"asks for {prompt_length + wanted} tokens ({prompt_length} in the prompt and "
            f"{wanted} in the completion)",
            f"at most the model's maximum context of {limits.max_model_len} tokens",
            code="context_length_exceeded",
        )
    if params.min_tokens > wanted:
        refuse("min_tokens", params.min_tokens, f"at most {wanted}, which the context leaves")
    seed = draw_seed() if params.seed is None else params.seed
    return dataclasses.replace(params, max_tokens=wanted, seed=seed)


def _check_against(params: SamplingParams, limits: Limits) -> None:
    named = {
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids or (),
        "stop_token_ids": params.stop_token_ids,
    }
    for name, ids in named.items():
        if (largest := max(ids, default=0)) >= limits.vocab_size:
            raise ParameterError(name, f"names id {largest}", f"ids in [0, {limits.vocab_size})")
    if params.logprobs is not None and params.logprobs > limits.max_logprobs:
        refuse("logprobs", params.logprobs, f"at most {limits.max_logprobs}")
    if params.priority and not limits.prioritises:
        refuse("priority", params.priority, '0: the scheduler\'s policy is not "priority"')
    if params.suffix is not None and not limits.fills_in_middle:
        refuse("suffix", params.suffix, "null: this model has no fill-in-the-middle tokens")


def banned_sequences(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell each of `bad_words` inside a text, with and without a space
    in front.
    """
    texts = [space + word.lstrip(" ") for word in words for space in ("", " ")]
    encoded = (tokenizer.encode_with_spans(text, continued=True)[0] for text in texts)
    return tuple(dict.fromkeys(tuple(map(int, ids)) for ids in encoded if len(ids)))


def _biases(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        refuse("logit_bias", given, "an object of ids and numbers")
    if len(given) > MAX_BIASES:
        raise ParameterError("logit_bias", f"has {len(given)} entries", f"at most {MAX_BIASES}")
    biases = {}
    for key, value in given.items():
        text = str(key)
        if not (text.isascii() and text.isdigit()):
            raise ParameterError("logit_bias", f"has the key {key!r}", "ids, 0 or more, as keys")
        biases[int(text)] = min(max(number("logit_bias", value), -MAX_BIAS), MAX_BIAS)
    return biases


PROMPT_ONLY = SamplingParams(temperature=0.0, max_tokens=0, echo=True)
"""Reads a prompt and draws nothing."""
