"""A model alone, in another number type: what a run leaves behind, ready to be handed on.

A run's checkpoint holds float32 parameters and the state of its optimizer. `cast_checkpoint` writes
the parameters, the tokenizer and the provenance, and notes the perplexity of what it wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data import load_tokenizer, open_source
from model.checkpoint import load, save
from model.provenance import provenance
from surgery.report import perplexity
from surgery.source import InMemory
from surgery.windows import consecutive


def cast_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str = "bfloat16",
    evaluate: str = "",
    windows: int = 32,
    text_key: str = "text",
) -> dict[str, Any]:
    """Write the checkpoint `out`: the newest one of `checkpoint`, dense arrays in `dtype`.

    With held-out text `evaluate`, the perplexity of `out` on its first `windows` whole windows of
    the model's length goes into its provenance, and comes back. The parent is noted as it was
    given, and text by the name of its file: a folder that is handed on shows no one's paths.
    """
    read = load(checkpoint, dtype=dtype)
    record: dict[str, Any] = {}
    if evaluate:
        length = min(2048, read.config.max_length)
        source = open_source(evaluate, text_key)
        found = consecutive(source, load_tokenizer(read.files), length, windows)
        loss = perplexity(InMemory(read.config, read.params), found.tokens)
        record = {**found.record, "source": Path(evaluate).name, "perplexity": loss}
    settings = {"dtype": dtype, "checkpoint": read.folder.name}
    origin = provenance("cast", settings, [str(checkpoint)])
    origin |= {"evaluation": record} if record else {}
    save(out, read.config, read.params, read.files, origin)
    return record
