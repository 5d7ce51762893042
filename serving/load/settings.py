"""What load to put on which server: `LoadSettings`."""

from __future__ import annotations

import json
import urllib.parse
from dataclasses import dataclass

from serving.load.lengths import Lengths


@dataclass(frozen=True)
class LoadSettings:
    """What load to put on which server; lengths are `128`, `uniform:8,256` or
    `lognormal:128,0.5` (median, and the deviation of the logarithm).

    url: the server, as http://host:port, with or without /v1.
    requests: how many in all.
    clients: so many clients each send a request as soon as their last one is answered.
    rate: requests a second at random times (Poisson) instead, however many are under way.
    prompt_tokens: tokens of a prompt, a length; those of the shared prefix come first.
    new_tokens: tokens to generate, a length.
    shared_prefix: tokens that prompts begin with alike.
    prefixes: how many such beginnings there are; each prompt has one of them.
    seed: the same seed sends the same requests.
    prompts: a file of JSON lines with `prompt` and, if wanted, `max_tokens`, instead of drawn ones.
    ids: send prompts as ids below this number, so that lengths are exact; 0 sends words.
    model: its name; None is the first that the server lists.
    chat: to /v1/chat/completions.
    stream: read tokens as they come; without, only whole answers are timed.
    temperature: 0 is greedy.
    ignore_eos: generate all tokens that are asked for, on servers that know the field.
    fields: a JSON object of further fields of every request, as {"top_p": 0.9}.
    api_key: None takes it from the environment, SHEAF_API_KEY or OPENAI_API_KEY.
    timeout_s: a request that takes longer counts as failed.
    out: where each request is written to, as JSON lines.
    plot: where the picture goes, .png, .svg or .pdf.
    """

    url: str = "http://127.0.0.1:8000"
    requests: int = 100
    clients: int = 8
    rate: float | None = None
    prompt_tokens: str = "128"
    new_tokens: str = "64"
    shared_prefix: int = 0
    prefixes: int = 1
    seed: int = 0
    prompts: str | None = None
    ids: int = 0
    model: str | None = None
    chat: bool = False
    stream: bool = True
    temperature: float = 0.0
    ignore_eos: bool = True
    fields: str = "{}"
    api_key: str | None = None
    timeout_s: float = 600.0
    out: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {self.url!r}; it must be like http://127.0.0.1:8000")
        for name in ("requests", "clients", "prefixes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("shared_prefix", "temperature", "ids"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("rate", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if self.chat and self.ids:
            raise ValueError("ids is given with chat; messages are texts: leave one of both out")
        try:
            listed = isinstance(json.loads(self.fields), dict)
        except ValueError:
            listed = False
        if not listed:
            raise ValueError(f"fields is {self.fields!r}; it must be a JSON object")
        for name in ("prompt_tokens", "new_tokens"):
            Lengths.parse(name, getattr(self, name))
