"""Where a model's files are: a folder, or `hub:owner/name[@revision]`, downloaded when it is not in
the cache.

The download is `huggingface_hub`'s (an optional dependency), with its cache, tokens and environment
variables (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`). Of a repository only what an
import reads is fetched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.families.reader import PICKLE, SAFETENSORS, Format
from model.families.stored import WeightFilesError

HUB = "hub:"
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "1_Pooling/config.json",
    SAFETENSORS.index,
)
"""Config, tokenizer and the index of the weights; the weights come second, by name."""


def resolve(source: str | Path, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The folder that a source stands for, with all files that an import reads.

    Args:
        source: a folder, or `hub:owner/name`, which may end in `@revision`.
        revision: branch, tag or commit of a repository; None is its main branch.
        allow_pickle: fetch `.bin` files of a repository without safetensors.

    Raises `WeightFilesError`: no such folder, no such repository, a gated one, no connection, or
    `huggingface_hub` is not installed.
    """
    text = str(source)
    if not text.startswith(HUB):
        return _local(text, revision)
    name, at, said = text.removeprefix(HUB).partition("@")
    if at and revision not in (None, said):
        raise WeightFilesError(f"{text}: names revision {said!r}, but revision is {revision!r} too")
    if name.count("/") != 1 or not all(name.split("/")) or (at and not said):
        raise WeightFilesError(f"{text}: wanted hub:owner/name or hub:owner/name@revision")
    return _download(name, said or revision, allow_pickle)


def _local(text: str, revision: str | None) -> Path:
    folder = Path(text).expanduser()
    if not folder.is_dir():
        hint = f"; for the repository say {HUB}{text}" if text.count("/") == 1 else ""
        raise WeightFilesError(f"{text}: no such folder{hint}")
    if revision is not None:
        raise WeightFilesError(f"{text}: a folder has no revision, but revision is {revision!r}")
    return folder


def _download(name: str, revision: str | None, allow_pickle: bool) -> Path:
    """Small files first, then the weights that the index names, all of one commit."""
    small = [*SMALL_FILES, PICKLE.index] if allow_pickle else list(SMALL_FILES)
    folder = _snapshot(name, revision, small)
    commit = folder.name
    _snapshot(name, commit, _weights(folder, SAFETENSORS))
    if SAFETENSORS.present(folder):
        return folder
    if allow_pickle:
        _snapshot(name, commit, _weights(folder, PICKLE))
        if PICKLE.present(folder):
            return folder
    raise WeightFilesError(
        f"{HUB}{name} at {commit} has no {SAFETENSORS.single}"
        + (f" and no {PICKLE.single}" if allow_pickle else "")
        + ("" if allow_pickle else f"; if it has {PICKLE.single}, read that with --allow-pickle")
    )


def _weights(folder: Path, form: Format) -> list[str]:
    """Names, or patterns, of the weights: those of the index, or else the usual ones."""
    index = folder / form.index
    if not index.is_file():
        return [form.single, f"{form.stem}-?????-of-?????.{form.suffix}"]
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightFilesError(f"{index}: not an index of weights ({error})") from error


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    library = _library()
    errors = library.errors
    where = f"{HUB}{name}" + (f"@{revision}" if revision else "")
    try:
        return Path(library.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise WeightFilesError(
            f"{where}: gated; accept the terms on its page, then set HF_TOKEN or run "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightFilesError(
            f"{where}: no such repository, or a private one (set HF_TOKEN to read that)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightFilesError(f"{where}: the repository has no such revision") from error
    except errors.HFValidationError as error:
        raise WeightFilesError(f"{where}: not the name of a repository ({_line(error)})") from error
    except errors.LocalEntryNotFoundError as error:
        raise WeightFilesError(
            f"{where}: the hub cannot be reached, and not all of it is in the cache "
            f"({_line(error)}); connect, unset HF_HUB_OFFLINE, or give a folder with the files"
        ) from error
    except Exception as error:
        raise WeightFilesError(
            f"{where}: the download failed ({type(error).__name__}: {_line(error)}); what "
            "arrived is kept, so run it again"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise WeightFilesError(
            "hub: needs huggingface_hub: pip install 'sheaf[hub]', or give a folder that holds the "
            "files"
        ) from error
    return huggingface_hub
