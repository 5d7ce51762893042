"""What a model's folder says about its tokens beside the vocabulary.

`tokenizer_config.json` names the special tokens, those added to the vocabulary, and what a prompt
begins with; older folders say it in `special_tokens_map.json` and `added_tokens.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.tokenizers.protocol import to_json

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary's own, found in text before the vocabulary is asked.

    id, content: its number and its text.
    special: it is text unless special tokens are allowed.
    single_word: it is found only where no letter or digit stands beside it.
    lstrip, rstrip: it takes the white space before or after it along.
    normalized: it is found in normalized text.
    """

    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


@dataclass(frozen=True)
class TokenSettings:
    """What the files say.

    roles: text of the token in each role that a file names, such as `bos_token`; None where a file
        says that there is none.
    added: added tokens, by id.
    special: texts of all tokens that some file calls special.
    add_bos, add_eos: whether a prompt gets them; None where no file says it.
    config: all of tokenizer_config.json.
    """

    roles: Mapping[str, str | None]
    added: tuple[AddedToken, ...]
    special: frozenset[str]
    add_bos: bool | None
    add_eos: bool | None
    config: Mapping[str, Any]

    @property
    def tokenizer_class(self) -> str:
        """The class that transformers would use, without `Fast`; empty where no file names it."""
        return str(self.config.get("tokenizer_class") or "").removesuffix("Fast")


def read_settings(files: Mapping[str, bytes]) -> TokenSettings:
    """What a folder's files say about its tokens.

    As in transformers, the two older files count only where `tokenizer_config.json` has no
    `added_tokens_decoder`. Raises `ValueError` that names the file.
    """
    config = read_json(files, CONFIG)
    decoder = config.get("added_tokens_decoder")
    older = read_json(files, SPECIAL_MAP) if decoder is None else {}
    named = {**config, **older}
    roles = {role: _text(named[role]) for role in ROLES if role in named}
    special = {text for text in roles.values() if text} | _more_special(named)
    if decoder is None:
        listed = [_older_token(*item, special) for item in read_json(files, ADDED).items()]
    else:
        listed = [_token(*item) for item in decoder.items()]
    special |= {token.content for token in listed if token.special}
    return TokenSettings(
        roles=roles,
        added=tuple(sorted(listed, key=lambda token: token.id)),
        special=frozenset(special),
        add_bos=_flag(config, "add_bos_token"),
        add_eos=_flag(config, "add_eos_token"),
        config=config,
    )


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: holds {type(value).__name__}, not an object")
    return value


def read_text(files: Mapping[str, bytes], name: str) -> str:
    """A file's text; raises `ValueError` that names the file."""
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error})") from error


def with_roles(files: Mapping[str, bytes], given: Mapping[str, str]) -> dict[str, bytes]:
    """The files, with roles that a caller gives written into `tokenizer_config.json`; files that
    say the same already stay as they are.
    """
    settings = read_settings(files)
    new = {role: text for role, text in given.items() if text and settings.roles.get(role) != text}
    if not new:
        return dict(files)
    changed = {**files, CONFIG: to_json({**settings.config, **new})}
    if SPECIAL_MAP in files and "added_tokens_decoder" not in settings.config:
        changed[SPECIAL_MAP] = to_json({**read_json(files, SPECIAL_MAP), **new})
    return changed


def _text(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, Mapping) else value
    return str(content) if content else None


def _more_special(named: Mapping[str, Any]) -> set[str]:
    """Special tokens outside the usual roles, the model's own `…_token` entries among them."""
    found: set[str | None] = set()
    for key in MORE_SPECIAL:
        values = named.get(key) or []
        found |= {_text(v) for v in (values.values() if isinstance(values, Mapping) else values)}
    own = [v for k, v in named.items() if k.endswith("_token") and isinstance(v, str | Mapping)]
    return {text for text in found | {_text(value) for value in own} if text}


def _token(key: str, value: Any) -> AddedToken:
    try:
        flags = {name: bool(value[name]) for name in ("special", "single_word") if name in value}
        flags |= {name: bool(value[name]) for name in ("lstrip", "rstrip") if name in value}
        normalized = bool(value.get("normalized", not flags.get("special", False)))
        return AddedToken(int(key), str(value["content"]), **flags, normalized=normalized)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ValueError(
            f"{CONFIG}: added_tokens_decoder[{key!r}] is {value!r}; it must be an id with an "
            "object that holds content"
        ) from None


def _older_token(content: str, number: Any, special: set[str]) -> AddedToken:
    if not isinstance(number, int):
        raise ValueError(f"{ADDED}: {content!r} is {number!r}; it must be an id")
    return AddedToken(number, content, content in special, normalized=content not in special)


def _flag(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise ValueError(f"{CONFIG}: {key} is {value!r}; it must be true or false")
