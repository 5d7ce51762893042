"""`generation_config.json`: how the makers of a model sample from it, and where it stops.

A checkpoint carries the file unchanged; this reads what Sheaf applies and names what it does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.sampling import GREEDY, Sampling

GENERATION_CONFIG, CONFIG = "generation_config.json", "config.json"
_DRAWING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What transformers' `generate` draws with where a file does not say."""
_ONLY_DRAWING = {
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Fields that count only where tokens are drawn, and their neutral values."""
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "min_length": 0,
    "min_new_tokens": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
    "guidance_scale": 1.0,
    "stop_strings": [],
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
_SAYS_NOTHING = frozenset(
    {
        "_from_model_config",
        "_commit_hash",
        "transformers_version",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "return_dict_in_generate",
        "output_scores",
        "output_logits",
        "output_attentions",
        "output_hidden_states",
        "decoder_start_token_id",
        "disable_compile",
        "compile_config",
        "prefill_chunk_size",
        "low_memory",
        "chat_format",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_early_exit",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "num_return_sequences",
    }
)
"""Fields that change no token: caches, outputs, speculation, which is exact."""
_READ = frozenset(
    {
        "do_sample",
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "max_length",
        "max_new_tokens",
        *_DRAWING,
    }
)


@dataclass(frozen=True)
class GenerationConfig:
    """How a model is meant to generate.

    sampling: as the file says; greedy unless it draws.
    stop_tokens: ids that end a text.
    pad_token, bos_token: ids that the file names.
    max_new_tokens: most tokens to add; None where the file does not say.
    max_length: most tokens with the prompt; None where the file does not say.
    not_applied: fields that change tokens, which `generate` does not know, with their values.
    """

    sampling: Sampling = GREEDY
    stop_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    bos_token: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    not_applied: Mapping[str, Any] = field(default_factory=dict)


def read_generation_config(
    files: Mapping[str, bytes], eos: int | Sequence[int] | None = None
) -> GenerationConfig:
    """What a checkpoint's files say about generating.

    Without `eos_token_id` in `generation_config.json` it is that of `config.json`, else `eos`, for
    which a caller has the tokenizer's. What a file leaves out is what transformers' `generate`
    takes, top-k 50 among it. Raises `ValueError` that names the file and field.
    """
    values = _object(files, GENERATION_CONFIG)
    draws = _typed(values, "do_sample", bool) or False
    stop = values.get("eos_token_id")
    if stop is None:
        stop = _object(files, CONFIG).get("eos_token_id", None)
    return GenerationConfig(
        sampling=_sampling(values) if draws else GREEDY,
        stop_tokens=_ids(eos if stop is None else stop),
        pad_token=_typed(values, "pad_token_id", int),
        bos_token=_typed(values, "bos_token_id", int),
        max_new_tokens=_typed(values, "max_new_tokens", int),
        max_length=_typed(values, "max_length", int),
        not_applied={k: v for k, v in values.items() if _matters(k, v, draws)},
    )


def _matters(name: str, value: Any, draws: bool) -> bool:
    """Whether a field changes tokens and is none of those that are read."""
    if name in _READ or name in _SAYS_NOTHING or value is None:
        return False
    if name in _ONLY_DRAWING:
        return draws and value != _ONLY_DRAWING[name]
    return name not in _NEUTRAL or value != _NEUTRAL[name]


def _sampling(values: Mapping[str, Any]) -> Sampling:
    chosen = {name: _typed(values, name, float) for name in _DRAWING}
    temperature, top_k, top_p = (
        _DRAWING[name] if value is None else value for name, value in chosen.items()
    )
    try:
        # Zero means "all" to transformers.
        return Sampling(float(temperature), int(top_k) or None, float(top_p))
    except ValueError as error:
        raise ValueError(f"{GENERATION_CONFIG}: {error}") from error


def _ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    several = list(value) if isinstance(value, Sequence) else [value]
    listed = [item for item in several if item is not None]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
        raise ValueError(f"{GENERATION_CONFIG}: eos_token_id is {value!r}; it must be an id or ids")
    return tuple(dict.fromkeys(listed))


def _typed(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    kinds = (int, float) if kind is float else kind
    if value is None or (isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)):
        return value
    raise ValueError(
        f"{GENERATION_CONFIG}: {name} is {value!r}; it must be {kind.__name__} or null"
    )


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: holds {type(value).__name__}, not an object")
    return value
