"""Print the documents behind any batch of a run: how a loss spike is looked into.

The batch is made again from the run's config, so what is printed is what the step read.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, from_mapping
from data.dataset import Dataset
from data.loader import Batch

SHOWN = 240


def load_data_config(
    path: str | Path, overrides: Mapping[str, str] | None = None
) -> tuple[DataConfig, tuple[tuple[int, int], ...]]:
    """`(DataConfig, batches skipped)` of a config file or of a run's folder.

    Args:
        path: a `.py` file with `get_config()`, or a folder with `config.json` (and `data.json`,
            whose
            `skips` name the batches that the run left out).
        overrides: fields below `data`, as text: `{"tokenizer.kind": "bytes"}`.
    """
    path = Path(path)
    skips: tuple[tuple[int, int], ...] = ()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path}: holds no config.json, so it is not a run's folder")
        config = json.loads((path / "config.json").read_text())
        if (path / "data.json").is_file():
            saved = json.loads((path / "data.json").read_text())
            skips = tuple((int(a), int(b)) for a, b in saved.get("skips", ()))
    else:
        config = _config_of_file(path)
    if not config.get("data"):
        raise ValueError(f"{path}: its config has no data section")
    fields = dict(config["data"])
    for dotted, text in (overrides or {}).items():
        *parents, name = dotted.split(".")
        node = fields
        for parent in parents:
            node[parent] = dict(node.get(parent) or {})
            node = node[parent]
        node[name] = _value(text)
    return from_mapping(DataConfig, fields), skips


def _config_of_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"config {str(path)!r}: no such file or run's folder")
    spec = importlib.util.spec_from_file_location(f"sheaf_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"config {str(path)!r}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    return config.to_dict() if hasattr(config, "to_dict") else config


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def show(
    dataset: Dataset,
    step: int,
    rows: Iterable[int] | None = None,
    *,
    whole: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Print a step's rows: source, file, row and token range of each document, and its text.

    Args:
        dataset: what `build` gave.
        step: a training step.
        rows: rows of the batch; all by default.
        whole: print all of the text, not its beginning.
        say: takes each line.
    """
    chosen = np.arange(dataset.config.batch_size) if rows is None else np.array(list(rows))
    if chosen.size and (chosen.min() < 0 or chosen.max() >= dataset.config.batch_size):
        raise ValueError(f"rows {chosen.tolist()}: a batch has {dataset.config.batch_size} rows")
    batch = dataset.train.batch_at(step, chosen)
    index = dataset.train.order.batch_index(step)
    say(f"step {step} reads batch {index}" if index != step else f"step {step}")
    for number, origin in enumerate(dataset.train.describe(step, chosen)):
        say(f"row {origin.row}: {origin.source}, epoch {origin.epoch}, window {origin.window}")
        for segment, (file, row, start, stop) in enumerate(origin.pieces, 1):
            predicted = batch["loss_mask"][number][batch["segment_ids"][number] == segment].sum()
            where = f"{file} row {row}, tokens {start:,} to {stop:,}"
            say(f"  {segment}. {where}, {predicted:.0f} predicted")
            text = segment_text(dataset, batch, number, segment)
            cut = text if whole or len(text) <= SHOWN else text[:SHOWN] + "…"
            say("     " + cut.replace("\n", "\n     "))


def segment_text(dataset: Dataset, batch: Batch, row: int, segment: int) -> str:
    """The text of one segment of a batch's row."""
    ids = batch["tokens"][row][batch["segment_ids"][row] == segment]
    return dataset.tokenizer.decode(ids.tolist())
