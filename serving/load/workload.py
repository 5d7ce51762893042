"""The requests of a load: prompts, lengths and times, all drawn from one seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.load.lengths import Lengths
from serving.load.settings import LoadSettings

_TEXT = (
    "the of and to in is that it was for on are as with his they at be this from have or by one"
    " had not but what all were when we there can an your which their said if do will each about"
    " how up out them then she many some so these would other into has more her two like him see"
    " time could no make than first been its who now people my made over did down only way find"
    " use may water long little very after words called just where most know"
)
WORDS = _TEXT.split()
"""Common English words, of which each is a token in most vocabularies."""


@dataclass(frozen=True)
class Planned:
    """A request to come: at `at` seconds from the start, or as soon as a client is free (None)."""

    index: int
    prompt: str | list[int]
    max_tokens: int
    at: float | None = None


def draw(settings: LoadSettings, tokens_per_word: float = 1.0) -> list[Planned]:
    """The requests of a load.

    tokens_per_word: of `WORDS` on the server, so that prompts of words have about the tokens asked
    for. Raises `ValueError` for a file of prompts that does not say what to send.
    """
    rng, count = np.random.default_rng(settings.seed), settings.requests
    lengths = Lengths.parse("prompt_tokens", settings.prompt_tokens).draw(count, rng)
    wanted = Lengths.parse("new_tokens", settings.new_tokens).draw(count, rng)
    times: Sequence[float | None] = [None] * count
    if settings.rate is not None:
        times = np.cumsum(rng.exponential(1.0 / settings.rate, count)).tolist()
    if settings.prompts is not None:
        given = read_prompts(Path(settings.prompts), wanted)
        chosen = [given[index % len(given)] for index in range(count)]
    else:
        chosen = list(zip(_prompts(settings, lengths, tokens_per_word, rng), wanted, strict=True))
    return [
        Planned(index, prompt, most, at)
        for index, ((prompt, most), at) in enumerate(zip(chosen, times, strict=True))
    ]


def _prompts(
    settings: LoadSettings, lengths: Sequence[int], per_word: float, rng: np.random.Generator
) -> list[str | list[int]]:
    """Prompts of so many tokens, the first of which are a shared prefix."""
    scale = 1.0 if settings.ids else per_word

    def some(tokens: int) -> list[int]:
        units = max(round(tokens / scale), 0)
        return rng.integers(0, settings.ids or len(WORDS), units).tolist()

    starts = [some(settings.shared_prefix) for _ in range(settings.prefixes)]
    found: list[str | list[int]] = []
    for length in lengths:
        start = starts[int(rng.integers(len(starts)))]
        units = start + some(max(length - settings.shared_prefix, 1))
        found.append(units if settings.ids else " ".join(WORDS[unit] for unit in units))
    return found


def read_prompts(path: Path, wanted: Sequence[int]) -> list[tuple[str | list[int], int]]:
    """`prompt` and `max_tokens` of each line; `wanted` where a line has no `max_tokens`."""
    found: list[tuple[str | list[int], int]] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, most = row["prompt"], row.get("max_tokens", wanted[len(found) % len(wanted)])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}:{number}: {line[:60]!r}; a line must be like "
                '{"prompt": "Once upon", "max_tokens": 64}'
            ) from None
        if not (isinstance(prompt, str | list) and prompt and isinstance(most, int) and most > 0):
            raise ValueError(
                f"{path}:{number}: prompt {str(prompt)[:40]!r}, max_tokens {most!r}; they must be "
                "a text or ids, and 1 or more"
            )
        found.append((prompt, most))
    if not found:
        raise ValueError(f"{path}: no prompts; a line must be like " + '{"prompt": "Once upon"}')
    return found
