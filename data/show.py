"""Print the documents behind any batch of a run: how a loss spike is looked into.

The batch is made again from the run's config, so what is printed is what the step read.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, from_mapping
from data.dataset import Dataset
from data.order import merge_ranges

SHOWN = 240


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a run reads: its data, and the batches it left out or moved to its end.

    With n batches deferred, a run of `steps` steps reads those n in its last n.
    """

    config: DataConfig
    skips: tuple[tuple[int, int], ...] = ()
    deferred: tuple[tuple[int, int], ...] = ()
    steps: int = 0

    def batch_index(self, step: int) -> int:
        """The batch that a step of the run read."""
        never = {batch for start, stop in self.skips for batch in range(start, stop)}
        ranges = [range(start, stop) for start, stop in self.deferred]
        moved = [batch for batch in itertools.chain(*ranges) if batch not in never]
        turn = step - (self.steps - len(moved))
        if moved and 0 <= turn < len(moved):
            return moved[turn]
        index = step - (len(moved) if moved and turn >= 0 else 0)
        for start, stop in merge_ranges((*self.skips, *self.deferred)):
            index += stop - start if index >= start else 0
        return index


def read_run(path: str | Path, overrides: Mapping[str, str] | None = None) -> Reading:
    """What the run of a config file or of a run's folder reads.

    Args:
        path: a `.py` file with `get_config()`, or a folder with `config.json` (and `order.json`,
            which names the batches that the run skipped or deferred).
        overrides: fields below `data`, as text: `{"tokenizer.kind": "bytes"}`.
    """
    path = Path(path)
    order: dict[str, Any] = {}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path}: holds no config.json, so it is not a run's folder")
        config = json.loads((path / "config.json").read_text())
        if (path / "order.json").is_file():
            order = json.loads((path / "order.json").read_text())
    else:
        config = _config_of_file(path)
    if not config.get("data"):
        raise ValueError(f"{path}: its config has no data section")
    fields = dict(config["data"])
    for dotted, text in (overrides or {}).items():
        _set(fields, dotted.split("."), _value(text))
    return Reading(
        from_mapping(DataConfig, fields),
        skips=_ranges(order.get("skips", ())),
        deferred=_ranges(order.get("deferred", ())),
        steps=(config.get("train") or {}).get("steps", 0),
    )


def _ranges(stored: Iterable[Iterable[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(start), int(stop)) for start, stop in stored)


def _set(fields: dict[str, Any], path: list[str], value: Any) -> None:
    *parents, name = path
    for parent in parents:
        fields[parent] = dict(fields.get(parent) or {})
        fields = fields[parent]
    fields[name] = value


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
    batch: int,
    rows: Iterable[int] | None = None,
    *,
    whole: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Print a batch's rows: source, file, row and token range of each document, and its text.

    Args:
        dataset: what `build` gave.
        batch: number of the batch, which is the step unless the run has skipped some.
        rows: rows of the batch; all by default.
        whole: print all of the text, not its beginning.
        say: takes each line.
    """
    loader = dataset.train.with_skips(())
    chosen = np.arange(loader.batch_size) if rows is None else np.array(list(rows))
    if chosen.size and (chosen.min() < 0 or chosen.max() >= loader.batch_size):
        raise ValueError(f"rows {chosen.tolist()}: a batch has {loader.batch_size} rows")
    arrays = loader.batch_at(batch, chosen)
    for number, origin in enumerate(loader.describe(batch, chosen)):
        say(f"row {origin.row}: {origin.source}, epoch {origin.epoch}, window {origin.window}")
        for segment, (file, row, start, stop) in enumerate(origin.pieces, 1):
            inside = arrays["segment_ids"][number] == segment
            predicted = arrays["loss_mask"][number][inside].sum()
            where = f"{file} row {row}, tokens {start:,} to {stop:,}"
            say(f"  {segment}. {where}, {predicted:.0f} predicted")
            text = dataset.tokenizer.decode(arrays["tokens"][number][inside].tolist())
            cut = text if whole or len(text) <= SHOWN else text[:SHOWN] + "…"
            say("     " + cut.replace("\n", "\n     "))
