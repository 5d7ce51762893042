"""The model that `serving.py` measures, in the three forms that servers read.

The 12M-parameter Llama of configs/llama_12m.py with random weights, room for long prompts, and a
byte-level BPE tokenizer. Only tokens of plain text can win, so that texts show which tokens were
chosen, and every answer is as long as it was asked to be.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generate_worker import model_config

LENGTH = 2048
"""Tokens that the model may see, so that long prompts can be measured too."""
TEXT_BYTES = 2_000_000


@dataclass(frozen=True)
class Files:
    """Folders of the checkpoint and its export for Hugging Face, the file for llama.cpp (None
    without an interpreter that writes it), and text to cut prompts from.
    """

    checkpoint: Path
    hugging_face: Path
    gguf: Path | None
    text: str
    tokenizer: Any


def prepare(folder: Path, llama_python: str | None) -> Files:
    """Write all three forms of the model."""
    import jax

    from data.tokenizers.json_file import FileTokenizer
    from model import init
    from model.checkpoint import load, save
    from model.families.exporter import export_checkpoint

    text = source_text()
    config = dataclasses.replace(model_config(folder), max_length=LENGTH)
    tokenizer = FileTokenizer.train([text], config.vocab_size)
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    params["head"]["kernel"] = params["head"]["kernel"] * plain_tokens(tokenizer)
    checkpoint = save(folder / "llama-12m", config, params, tokenizer.files())
    exported = export_checkpoint(load(checkpoint), folder / "llama-12m-hf", dtype="float32")
    gguf = None
    if llama_python is not None:
        gguf = folder / "llama-12m.gguf"
        script = Path(__file__).with_name("serving_gguf.py")
        subprocess.run([llama_python, script, exported, gguf], check=True)
    return Files(checkpoint, exported, gguf, text, tokenizer)


def source_text() -> str:
    """Plain text of Python's library."""
    parts, size = [], 0
    for path in sorted(Path(json.__file__).parents[1].glob("*.py")):
        part = path.read_bytes().decode("ascii", "ignore")
        parts.append(part)
        size += len(part)
        if size > TEXT_BYTES:
            break
    return "".join(parts)


def plain_tokens(tokenizer: Any) -> np.ndarray:
    """`float32[vocab]`, 1 for each token that is printable text and 0 for all others."""
    special = set(tokenizer.special_tokens.values())
    plain = np.zeros(tokenizer.vocab_size, np.float32)
    for index in range(tokenizer.vocab_size):
        text = tokenizer.decode([index]).replace("\n", " ")
        plain[index] = index not in special and text.isascii() and text.isprintable()
    return plain


def prompts(files: Files, count: int, tokens: int, seed: int) -> list[str]:
    """Texts of about so many tokens, from random places."""
    ids = np.asarray(files.tokenizer.encode([files.text])[0])
    starts = np.random.default_rng(seed).integers(0, len(ids) - tokens, count)
    return [files.tokenizer.decode(ids[start : start + tokens].tolist()) for start in starts]
