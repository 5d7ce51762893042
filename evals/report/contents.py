"""What a report shows: models, sweeps, and every paired comparison, corrected as one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals import results
from evals.comparing import Compared, compare_task, corrected, draws_for
from evals.curves import Curve, curves
from evals.results import Results
from evals.sweep import FILE, Sweep, read_sweep
from model.checkpoint_folder import step_name

BROWSED_OF_A_SWEEP = 5


@dataclass(frozen=True)
class Model:
    """One model's results under a name that no other has in the report."""

    label: str
    folder: Path
    results: Results

    @property
    def bits(self) -> float | None:
        """Bits a weight, where the results say it."""
        found = self._facts().get("bits_per_weight")
        return None if found is None else float(found)

    @property
    def method(self) -> str:
        """How the checkpoint was made: train, import, or a method of surgery."""
        return str(self._facts().get("method") or "")

    def _facts(self) -> dict:
        return dict(self.results["model"].get("facts") or {})


@dataclass(frozen=True)
class Series:
    """A run's checkpoints. models: one a checkpoint, in order."""

    label: str
    sweep: Sweep
    curves: tuple[Curve, ...]
    models: tuple[Model, ...]


@dataclass(frozen=True)
class Contents:
    """All of a report.

    compared: of each model but the first, by label, against the first; p adjusted by Holm over all
    of them together. notes: what could not be compared, and why.
    """

    models: tuple[Model, ...]
    series: tuple[Series, ...]
    compared: dict[str, tuple[Compared, ...]]
    notes: tuple[str, ...]

    @property
    def everyone(self) -> list[Model]:
        """The models, then all checkpoints of sweeps."""
        return [*self.models, *(model for each in self.series for model in each.models)]

    @property
    def browsed(self) -> list[Model]:
        """Those whose answers are shown: all models, and of a sweep a few, first and last among
        them.
        """
        chosen = (spread(each.models, BROWSED_OF_A_SWEEP) for each in self.series)
        return [*self.models, *(model for few in chosen for model in few)]


def spread(items: Sequence[Model], most: int) -> list[Model]:
    """At most so many, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def collect(folders: Sequence[str | Path]) -> Contents:
    """Read results: of models (`OUT/MODEL`), of all models of an `OUT`, of sweeps.

    Raises `ValueError` for a folder that holds neither; names it.
    """
    taken: set[str] = set()
    models: list[Model] = []
    series: list[Series] = []
    for folder in map(Path, folders):
        if (folder / FILE).is_file():
            series.append(_series(folder, _label(folder, taken)))
        else:
            models += [Model(_label(f, taken), f, results.read(f)) for f in _models(folder)]
    compared, notes = _compare(models)
    return Contents(tuple(models), tuple(series), compared, tuple(notes))


def _models(folder: Path) -> Iterable[Path]:
    if (folder / results.RESULTS).is_file() or not folder.is_dir():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{results.RESULTS}"))
    if not found:
        raise ValueError(f"{folder}: holds neither {results.RESULTS} nor {FILE}, nor has a folder "
                         f"with {results.RESULTS}")  # fmt: skip
    return found


def _label(folder: Path, taken: set[str]) -> str:
    folder = folder.absolute()
    names = [folder.name, f"{folder.parent.name}/{folder.name}"]
    names += [f"{folder.name}-{number}" for number in range(2, len(taken) + 3)]
    label = next(name for name in names if name not in taken)
    taken.add(label)
    return label


def _series(folder: Path, label: str) -> Series:
    found = read_sweep(folder)
    models = []
    for point in found.points:
        path = folder / step_name(point.step)
        models.append(Model(f"{label} step {point.step}", path, results.read(path)))
    return Series(label, found, tuple(curves(folder)), tuple(models))


def _compare(models: Sequence[Model]) -> tuple[dict[str, tuple[Compared, ...]], list[str]]:
    """Every model but the first against the first, and what could not be compared."""
    if not models:
        return {}, []
    first, *others = models
    pairs, notes = [], []
    for other in others:
        for name in sorted(first.results["tasks"].keys() & other.results["tasks"].keys()):
            mine, theirs = (model.results["tasks"][name] for model in (first, other))
            if (mine["data"], mine["examples"]) == (theirs["data"], theirs["examples"]):
                pairs.append((other, name))
            else:
                notes.append(f"{name} of {other.label} ran on other examples than {first.label}'s")
    draws, tests = draws_for(len(pairs)), []
    for other, name in pairs:
        try:
            tests.append((other.label, compare_task(first.folder, other.folder, name, draws)))
        except ValueError as error:
            notes.append(f"{name} of {other.label} was not compared: {error}")
    found: dict[str, tuple[Compared, ...]] = {}
    adjusted = corrected([each for _, each in tests])
    for (label, _), each in zip(tests, adjusted, strict=True):
        found[label] = (*found.get(label, ()), each)
    return found, notes
