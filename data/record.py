"""What a dataset says about itself: a table for people, a manifest for the run's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.dataset import Dataset

_SETTINGS = (
    "length",
    "batch_size",
    "packing",
    "max_segments",
    "buckets",
    "shift",
    "shuffle",
    "seed",
    "validation_fraction",
    "validation_split",
)


def manifest(dataset: Dataset) -> dict[str, Any]:
    """What the batches are made of, as JSON: equal manifests give equal batches at every step."""
    order = dataset.train.order
    return {
        "sources": [
            {
                "name": component.name,
                "path": component.store.manifest["source"]["spec"],
                "fingerprint": component.store.manifest["source"]["fingerprint"],
                "tokens": component.store.manifest["fingerprint"],
                "counts": component.store.manifest["counts"],
                "windows": component.plan.windows,
            }
            for component in dataset.train.components
        ],
        "validation": [
            {
                "name": component.name,
                "tokens": component.store.manifest["fingerprint"],
                "windows": component.plan.windows,
            }
            for component in (dataset.validation.components if dataset.validation else ())
        ],
        "tokenizer": dataset.tokenizer.fingerprint,
        "bytes_per_token": dataset.bytes_per_token,
        "settings": {
            name: list(value) if isinstance(value, tuple) else value
            for name in _SETTINGS
            for value in [getattr(dataset.config, name)]
        },
        "phases": [
            {"start": phase.start, "weights": list(phase.mixture.weights)} for phase in order.phases
        ],
        "skips": [list(skip) for skip in order.skips],
    }


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> None:
    """Raise if the data of a run is not what it was when the run was saved at `step`.

    Phases that begin after `step` may change, and so may the batches that are skipped and the place
    of files whose content is the same.
    """
    compared = [{**each, "sources": _without_paths(each["sources"])} for each in (saved, now)]
    changed = [
        f"{name} was {_short(compared[0][name])}, is {_short(compared[1][name])}"
        for name in ("tokenizer", "settings", "sources", "validation")
        if compared[0][name] != compared[1][name]
    ]
    begun = [[phase for phase in each["phases"] if phase["start"] <= step] for each in (saved, now)]
    if begun[0] != begun[1]:
        changed.append(f"phases up to step {step} were {begun[0]}, are {begun[1]}")
    if changed:
        raise ValueError(
            "the data of this run has changed, so its batches would too; put it back, or start "
            "another run:\n  " + "\n  ".join(changed)
        )


def _without_paths(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in source.items() if k != "path"} for source in sources]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:297] + "…"


def table(dataset: Dataset, steps: int | None = None) -> str:
    """Sources, one a line: documents, tokens, weight, windows there and drawn; then notes."""
    order = dataset.train.order
    heads = ["source", "documents", "tokens", "weight", "windows"]
    lines = [heads + (["drawn", "epochs"] if steps is not None else [])]
    drawn = order.drawn(order.batch_index(steps or 0))
    for number, component in enumerate(dataset.train.components):
        counts = component.store.manifest["counts"]
        weights = [p.mixture.weights[number] / sum(p.mixture.weights) for p in order.phases]
        line = [
            component.name,
            f"{counts['documents']:,}",
            f"{counts['tokens']:,}",
            " > ".join(f"{weight:.3g}" for weight in weights),
            f"{component.plan.windows:,}",
        ]
        if steps is not None:
            line += [f"{drawn[number]:,}", f"{drawn[number] / component.plan.windows:.2f}"]
        lines.append(line)
    return "\n".join(_aligned(lines) + _notes(dataset))


def _aligned(lines: list[list[str]]) -> list[str]:
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return [
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, others, strict=True))])
        for name, *cells in lines
    ]


def _notes(dataset: Dataset) -> list[str]:
    config = dataset.config
    notes = [
        f"windows of {config.length} tokens ({config.packing}), {config.batch_size} a step; "
        f"vocabulary {dataset.tokenizer.vocab_size:,}, {dataset.bytes_per_token:.3f} bytes a token"
    ]
    if dataset.validation:
        windows = sum(component.plan.windows for component in dataset.validation.components)
        notes.append(f"validation: {windows:,} windows in {len(dataset.validation):,} batches")
    if len(dataset.train.order.phases) > 1:
        starts = ", ".join(f"{phase.start:,}" for phase in dataset.train.order.phases)
        notes.append(f"phases begin at batches {starts}")
    for component in dataset.train.components:
        counts = component.store.manifest["counts"]
        ignored = component.store.manifest["source"]["ignored"]
        if counts["bad_rows"]:
            listed = component.store.folder / "bad_rows.jsonl"
            notes.append(f"{component.name}: {counts['bad_rows']} bad rows skipped, see {listed}")
        if counts["empty"]:
            notes.append(f"{component.name}: {counts['empty']} rows are empty")
        if ignored:
            held = ", ".join(f"{count} {suffix}" for suffix, count in ignored.items())
            notes.append(f"{component.name}: files left out because they are not text: {held}")
    return notes
