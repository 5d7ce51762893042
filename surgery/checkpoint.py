"""A quantized checkpoint from a checkpoint: read, calibrate, quantize, measure, write.

The new folder appears at once, whole. Until then all lies in `OUT.working`, from which a run that
was killed goes on; memory holds one block at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data import load_tokenizer, open_source
from model import Runtime
from model import checkpoint as checkpoints
from model.checkpoint_folder import COMMIT, CheckpointError
from model.provenance import provenance
from surgery import report, windows
from surgery.quantize import driver
from surgery.quantize.driver import Progress
from surgery.quantize.method import Method
from surgery.quantize.options import Options, settings
from surgery.source import Folder, InMemory, Source, dense
from surgery.statistics import SavedStatistics
from surgery.windows import Windows
from surgery.work import Work

WORKING = ".working"
CALIBRATION = "calibration.json"
ROWS = "quantization.jsonl"


@dataclass(frozen=True)
class Text:
    """Text for calibration and for measuring.

    data: calibration text: a file, a folder, a glob, or stdlib:.
    text_key: field or column of the text.
    windows: number of calibration windows.
    length: tokens of a window; 0 is 2048, or as many as the model has positions.
    seed: of the places that windows are cut from.
    evaluate: held-out text, whose perplexity is measured before and after.
    evaluate_windows: windows of it at most.
    save_statistics: folder of the unquantized model's calibration statistics, for methods that
        learn from it: read if all are there, so that the text is not run again; else made and kept.
    """

    data: str = ""
    text_key: str = "text"
    windows: int = 128
    length: int = 0
    seed: int = 0
    evaluate: str = ""
    evaluate_windows: int = 64
    save_statistics: str = ""


def quantize_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    name: str,
    method: Method,
    *,
    text: Text | None = None,
    options: Options | None = None,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `out`: `checkpoint` with its linear layers quantized.

    Args:
        checkpoint: a checkpoint folder or a run, of plain arrays.
        out: a folder that does not exist.
        name: of the method, for provenance.
        method: its settings.
        text: what to calibrate and measure with.
        options: what to quantize.
        runtime: compute dtype and mesh of the passes.
        progress: called with (layers done, all layers, what is going on).

    Returns:
        The summary that provenance holds too: mean bits, errors, perplexities, seconds, memory.

    Raises:
        CheckpointError: the folders are not what they must be.
        ValueError: settings or text that do not fit; nothing is written then.
    """
    text, options, runtime = text or Text(), options or Options(), runtime or Runtime()
    out, began = Path(out).absolute(), time.monotonic()
    if jax.process_count() > 1:
        raise CheckpointError(f"{jax.process_count()} processes: surgery runs in one process")
    if out.exists():
        raise CheckpointError(f"{out} exists; a checkpoint is never overwritten, choose another")
    source = dense(Folder(checkpoint))
    driver.check_targets(source, method, options)
    calibration, held_out = _windows(source, method, text)
    statistics = _statistics(source, method, text, calibration, runtime)
    work = Work(
        source.config,
        out.with_name(out.name + WORKING),
        {
            "checkpoint": str(source.folder),
            "method": name,
            "settings": settings(method, options),
            "calibration": None if calibration is None else calibration.record["sha256"],
            "statistics": statistics is not None and statistics.whole(source.config.num_layers),
            "compute_dtype": runtime.compute_dtype,
            "devices": 1 if runtime.layout is None else runtime.layout.mesh.size,
        },
    )
    try:
        params, rows, summary = _quantized(
            source, method, calibration, held_out, options, runtime, work, statistics, progress
        )
    except ValueError:
        work.remove()  # the same command would fail again
        raise
    summary["total_seconds"] = round(time.monotonic() - began, 1)
    summary["peak_host_gigabytes"] = round(_peak_bytes() / 1e9, 3)
    files: dict[str, bytes | str] = {**source.files, ROWS: _lines(rows)}
    record: dict[str, Any] = {"summary": summary}
    if calibration is not None:
        record["calibration"] = dict(calibration.record)
        files[CALIBRATION] = json.dumps(record["calibration"], indent=1) + "\n"
    origin = provenance(name, settings(method, options), [str(source.folder)])
    checkpoints.save(out, source.config, params, files, {**origin, **record})
    work.remove()
    return summary


def _quantized(
    source: Folder,
    method: Method,
    calibration: Windows | None,
    held_out: Windows | None,
    options: Options,
    runtime: Runtime,
    work: Work,
    statistics: SavedStatistics | None,
    progress: Progress | None,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The new params, the report's rows, and their summary with perplexities on held-out text."""
    alone = dataclasses.replace(runtime, layout=None)

    def measure(model: Source, name: str) -> dict[str, float]:
        if held_out is None:
            return {}
        found = report.perplexity(model, held_out.tokens, runtime=alone, work=work)
        return {f"perplexity_{name}": found}

    before = measure(source, "before")
    tokens = None if calibration is None else calibration.tokens
    params, rows = driver.quantize(
        source,
        method,
        tokens,
        options=options,
        runtime=runtime,
        work=work,
        statistics=statistics,
        progress=progress,
    )
    after = measure(InMemory(source.config, params), "after")
    return params, rows, {**report.summary(rows), **before, **after}


def _windows(source: Folder, method: Method, text: Text) -> tuple[Windows | None, Windows | None]:
    """Calibration and held-out windows, those that are needed."""
    if method.inputs != "none" and not text.data:
        raise ValueError(
            f"{type(method).__name__} learns from the inputs of layers: give calibration text with "
            "--data=FILE"
        )
    if method.inputs == "none" and not text.evaluate:
        return None, None
    tokenizer = load_tokenizer(source.files)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise ValueError(
            f"{source.folder}: its tokenizer has {tokenizer.vocab_size} tokens, its model only "
            f"{source.config.vocab_size}"
        )
    length = text.length or min(2048, source.config.max_length)
    calibration = held_out = None
    if method.inputs != "none":
        calibration = windows.draw(
            open_source(text.data, text.text_key), tokenizer, text.windows, length, text.seed
        )
    if text.evaluate:
        held_out = windows.consecutive(
            open_source(text.evaluate, text.text_key),
            tokenizer,
            length,
            text.evaluate_windows,
        )
    return calibration, held_out


def _statistics(
    source: Folder, method: Method, text: Text, calibration: Windows | None, runtime: Runtime
) -> SavedStatistics | None:
    """The folder of saved statistics, if one is named."""
    if not text.save_statistics:
        return None
    if method.inputs != "fp" or calibration is None:
        raise ValueError(
            f"--save-statistics={text.save_statistics}: {type(method).__name__} does not learn "
            "from the unquantized model, whose statistics they are; leave it out"
        )
    return SavedStatistics(text.save_statistics, statistics_of(source, calibration, runtime))


def statistics_of(source: Folder, calibration: Windows, runtime: Runtime) -> dict[str, str]:
    """Which statistics a folder of them holds: of what model, windows and compute dtype."""
    return {
        "checkpoint": hashlib.sha256((source.folder / COMMIT).read_bytes()).hexdigest(),
        "calibration": calibration.record["sha256"],
        "compute_dtype": str(jnp.dtype(runtime.compute_dtype)),
    }


def _peak_bytes() -> int:
    """The most memory this process has held, mapped files included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
