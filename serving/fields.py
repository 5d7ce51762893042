"""From the fields of a completion or chat request to `SamplingParams`.

What a request leaves out comes from the checkpoint's `generation_config.json`, then from the
defaults of the API. Fields that nobody knows are named, so that a server can say it ignored them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from serving.checks import ParameterError, integer, refuse
from serving.sampling_params import SamplingParams

_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_COMPLETIONS_ONLY = ("best_of", "echo", "suffix")
_FROM_CHECKPOINT = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
"""Fields of `generation_config.json` and what they are called in a request."""


def checkpoint_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the object in a checkpoint's `generation_config.json` says of a request's fields.

    `"do_sample": false` written out is temperature 0; a file that does not say keeps the API's 1.
    """
    given = {
        name: generation_config[theirs]
        for theirs, name in _FROM_CHECKPOINT.items()
        if generation_config.get(theirs) is not None
    }
    return given | ({"temperature": 0.0} if generation_config.get("do_sample") is False else {})


def from_fields(
    fields: Mapping[str, Any],
    *,
    chat: bool = False,
    defaults: Mapping[str, Any] | None = None,
    other_fields: Collection[str] = (),
) -> tuple[SamplingParams, tuple[str, ...]]:
    """The parameters of a request's JSON object, and the names of the fields that are unknown.

    defaults: what `checkpoint_defaults` gave. other_fields: names that the server itself reads,
    `model` and `prompt` among them. Null is as if left out. Raises `ParameterError`.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    chosen = {name: value for name, value in given.items() if name in _NAMES}
    handled = set(other_fields) | {"stream"}
    if chat:
        handled |= {"max_completion_tokens", "top_logprobs"}
        chosen |= _chat(given)
    if given.get("stream") and _candidates(chosen) > _integer(chosen.get("n"), 1):
        refuse("best_of", chosen["best_of"], "n, or null, with stream")
    table = {"max_tokens": None} if chat else {}
    merged = {**table, **_fitting(defaults or {}, chosen), **chosen}
    unknown = tuple(name for name in fields if name not in _NAMES and name not in handled)
    return SamplingParams(**merged), unknown


def _chat(given: Mapping[str, Any]) -> dict[str, Any]:
    """What chat calls otherwise: `max_completion_tokens`, and log-probabilities in two fields."""
    for name in _COMPLETIONS_ONLY:
        if given.get(name, False) is not False:
            refuse(name, given[name], "null in a chat; it belongs to completions")
    chosen: dict[str, Any] = {}
    if "max_completion_tokens" in given:
        limit = integer("max_completion_tokens", given["max_completion_tokens"], 1)
        chosen["max_tokens"] = limit
    wanted, top = given.get("logprobs", False), given.get("top_logprobs")
    if not isinstance(wanted, bool):
        refuse("logprobs", wanted, "true or false in a chat; the count is top_logprobs")
    if top is not None:
        integer("top_logprobs", top, 0)
        if not wanted:
            raise ParameterError("top_logprobs", "is given without logprobs", "with logprobs true")
    chosen["logprobs"] = (top or 0) if wanted else None
    return chosen


def _fitting(defaults: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults without a least length that the request's own greatest length forbids."""
    most, least = chosen.get("max_tokens"), defaults.get("min_tokens")
    if isinstance(most, int) and isinstance(least, int) and least > most:
        return {**defaults, "min_tokens": most}
    return dict(defaults)


def _candidates(chosen: Mapping[str, Any]) -> int:
    return _integer(chosen.get("best_of"), _integer(chosen.get("n"), 1))


def _integer(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise
