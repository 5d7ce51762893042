"""From a folder to what an engine serves: the model, its tokenizer, its chat template, its ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.chat import ChatTemplate, ChatTemplateError
from data.tokenizers import Tokenizer, load_tokenizer
from data.tokenizers.files import VOCABULARIES
from data.tokenizers.settings import read_json
from model import read_generation_config
from model.checkpoint import Checkpoint, load
from model.checkpoint_folder import CHECKPOINTS, MODEL
from model.families.importer import POOLING, import_checkpoint
from model.generation_config import GENERATION_CONFIG
from serving.fields import checkpoint_defaults
from sharding import Layout

HUB, MODE = "hub:", "pooling_mode_"
_POOLINGS = {"mean_tokens": "mean", "lasttoken": "last", "cls_token": "cls"}


def load_checkpoint(source: str | Path, layout: Layout | None = None) -> Checkpoint:
    """A checkpoint or run folder of ours, or a Hugging Face one: a folder, or `hub:owner/name`."""
    theirs = str(source).startswith(HUB) or _is_theirs(Path(source))
    return import_checkpoint(source, layout=layout) if theirs else load(source, layout)


def name_of(checkpoint: Checkpoint) -> str:
    """What a model is called: its folder, its run, or its name on the hub."""
    source = str(checkpoint.provenance.get("source", ""))
    if checkpoint.provenance.get("method") == "import" and source.startswith(HUB):
        return source.removeprefix(HUB).partition("@")[0]
    folder = checkpoint.folder
    return folder.parent.parent.name if folder.parent.name == CHECKPOINTS else folder.name


def tokenizer_of(files: Mapping[str, bytes]) -> Tokenizer | None:
    """The tokenizer that a checkpoint carries, if it does."""
    return load_tokenizer(files) if any(name in files for name in VOCABULARIES) else None


def template_of(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """The chat template that a checkpoint carries, if it does."""
    try:
        return ChatTemplate.from_files(files)
    except ChatTemplateError:
        return None


def end_ids_of(files: Mapping[str, bytes], tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and all that the model's files name."""
    own = None if tokenizer is None else tokenizer.eos
    return frozenset((*read_generation_config(files).stop_tokens, *([] if own is None else [own])))


def defaults_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What a checkpoint says of fields that a request leaves out."""
    return checkpoint_defaults(read_json(files, GENERATION_CONFIG))


def pooling_of(files: Mapping[str, bytes]) -> str:
    """How the checkpoint makes one vector of a text, by sentence-transformers' words: "mean" if it
    does not say, "last", or another that engines do not have.
    """
    said = read_json(files, POOLING)
    modes = [name for name, on in said.items() if on is True and name.startswith(MODE)]
    mode = said.get("pooling_mode") or "+".join(name.removeprefix(MODE) for name in modes)
    return _POOLINGS.get(str(mode), str(mode)) if mode else "mean"


def _is_theirs(folder: Path) -> bool:
    """A run of ours has a `config.json` too, and a checkpoint may carry theirs."""
    path = folder / "config.json"
    ours = (folder / MODEL).is_file() or not path.is_file()
    if ours:
        return False
    values = read_json({path.name: path.read_bytes()}, path.name)
    return "model_type" in values or "architectures" in values
