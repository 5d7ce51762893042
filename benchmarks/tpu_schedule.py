"""The hottest stretch of a compiled TPU kernel, from the compiler's own listing of its schedule.

libtpu writes, for every operation, which units of the core each instruction bundle uses. A bundle
is one cycle at best, so the longest stretch without a branch, its bundles, and how far its matrix
units are filled say more of a kernel than any other figure that is to be had without a TPU.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
"""Of libtpu, which reads them once, when it is loaded."""
_LABEL = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT|)\s*:\s*(>*)\s*\{")


@dataclass(frozen=True)
class Stretch:
    """bundles: instructions of the longest stretch between two labels. matrix_units: how far it
    fills the matrix units' slots, from 0 to 1.
    """

    bundles: int
    matrix_units: float


def ask_for_schedules(folder: str) -> None:
    """Have libtpu write its listings to a folder; call before anything is compiled for a TPU."""
    flags = FLAGS.format(folder=folder)
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


def take_hottest(folder: str) -> Stretch | None:
    """The hottest stretch of what was compiled since the last call; empties the folder."""
    found = []
    for listing in Path(folder).glob("*final_bundles.txt"):
        if "schedule-analysis" in listing.name or "TLP" in listing.name:
            continue
        operation = re.sub(r"-\d+-final_bundles\.txt$", "", listing.name)
        use = list(Path(folder).glob(f"{operation}-*-final_hlo-static-per-bundle-utilization.txt"))
        if use:
            found.append(_hottest(listing, use[0]))
    for file in Path(folder).iterdir():
        file.unlink()
    with_products = [stretch for stretch in found if stretch.matrix_units > 0]
    return max(with_products or found, key=lambda stretch: stretch.bundles, default=None)


def _hottest(listing: Path, use: Path) -> Stretch:
    lines = (_LABEL.match(line) for line in listing.read_text(errors="replace").splitlines())
    labels = [match.group(1) for match in lines if match]
    starts = [i for i, label in enumerate(labels) if label or i == 0] + [len(labels)]
    stretches = [(b - a, a, b) for a, b in itertools.pairwise(starts)]
    if not stretches:
        return Stretch(0, 0.0)
    bundles, first, last = max(stretches)
    slots, busy = _matrix_slots(use)
    return Stretch(bundles, sum(busy[first:last]) / max(1, slots * bundles))


def _matrix_slots(use: Path) -> tuple[int, list[int]]:
    """Slots of the matrix units in a bundle, and how many of them each bundle uses."""
    lines = [line.split() for line in use.read_text().splitlines()]
    rows = [[int(x) for x in line] for line in lines if line and all(x.isdigit() for x in line)]
    return rows[0][0], [row[0] for row in rows[1:]]
