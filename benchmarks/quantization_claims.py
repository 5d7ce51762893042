"""What papers claim of the order of methods, judged by rows of `benchmarks/quantization.py`.

A claim is about the losses of two models above the unquantized one's, window by window:

    loss(left) <= share * loss(right) + margin

Its error has two parts: windows, drawn anew, and calibration seeds, whose spread (not that of their
mean) is taken, so that a verdict does not rest on the seeds drawn. A difference of less than twice
the error decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quantization_measure import bootstrap_error
from benchmarks.quantization_report import Row, Verdict

LITTLE = 0.02
"""Nats a token: where the worse of two models loses less, their order says little."""
ERRORS = 2
"""Standard errors that decide."""
WITHIN = math.log(1.001)
"""Nats a token: 0.1 % of the perplexity."""


@dataclass(frozen=True)
class Which:
    """A model: its name in the table, bits, group, and whether outliers are planted."""

    name: str
    bits: int | None
    group: int | None = None
    planted: bool = False

    def __str__(self) -> str:
        group = {None: "", 0: ", a group a column"}.get(self.group, f", groups of {self.group}")
        bits = "" if self.bits is None else f" {self.bits} bits"
        return f"{self.name}{bits}{group}{', outliers planted' if self.planted else ''}"


@dataclass(frozen=True)
class Claim:
    """`loss(left) <= share * loss(right) + margin`, or not so if `denied`; without `right` its loss
    is 0.
    """

    left: Which
    right: Which | None = None
    share: float = 1.0
    margin: float = 0.0
    denied: bool = False

    def __str__(self) -> str:
        relation = "loses more than" if self.denied else "loses at most"
        if self.right is None:
            return f"{self.left}: {relation} {self.margin:.3g} nats"
        factor = "" if self.share == 1 else f"{self.share:g} of "
        relation = "loses less than" if self.share == 1 else relation
        return f"{self.left}: {relation} {factor}{self.right}"


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict of each claim whose rows were measured."""
    measured = [row for row in rows if row["state"] == "measured"]
    found = [verdict(claim, measured) for claim in claims(measured)]
    return [one for one in found if one is not None]


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """Those of the papers, at the groups that the rows have."""
    groups = sorted({row["group"] for row in rows if row["group"]}, reverse=True)
    for bits in (4, 3):
        for group in (*groups, 0):
            yield Claim(Which("gptq", bits, group), Which("rtn", bits, group))
    for bits in (4, 3):
        for name in ("rtn", "gptq"):
            yield from (Claim(Which(name, bits, g), Which(name, bits, 0)) for g in groups)
    for group in groups[-1:]:
        yield Claim(Which("nf4", 4, group), Which("fp4", 4, group))
        for name in ("rtn", "rtn_symmetric"):
            yield Claim(Which("fp4", 4, group), Which(name, 4, group))
        yield Claim(Which("gptq", 3, group), Which("rtn", 3, group), share=0.8)
        planted = (Which(name, 3, group, planted=True) for name in ("awq", "rtn"))
        yield Claim(*planted, share=0.6)
    plain = Which("int8_plain", 8, planted=True)
    yield Claim(Which("int8", 8, planted=True), margin=WITHIN)
    yield Claim(plain, margin=WITHIN, denied=True)
    yield Claim(Which("smoothquant", 8, planted=True), plain, share=0.1)


def verdict(claim: Claim, rows: Sequence[Row]) -> Verdict | None:
    """By the rows; None if some are missing."""
    left = _losses(claim.left, rows)
    right = None if claim.right is None else _losses(claim.right, rows)
    if left is None or (claim.right is not None and right is None):
        return None
    values, spread, worse = left.mean(axis=0), _spread(left), None
    if right is not None:
        values = values - claim.share * right.mean(axis=0)
        spread = math.hypot(spread, claim.share * _spread(right))
        worse = float(right.mean())
    difference = float(values.mean()) - claim.margin
    error = math.hypot(bootstrap_error(values), spread)
    seeds = max(len(left), 0 if right is None else len(right))
    return Verdict(str(claim), difference, error, seeds, _word(claim, difference, error, worse))


def _word(claim: Claim, difference: float, error: float, worse: float | None) -> str:
    if abs(difference) <= ERRORS * error:
        return "not decided"
    holds = (difference > 0) == claim.denied
    little = worse is not None and claim.share == 1 and worse < LITTLE
    return ("holds" if holds else "does not hold") + (", little lost" if little else "")


def _losses(which: Which, rows: Sequence[Row]) -> np.ndarray | None:
    """Above the unquantized model's, `float64[seeds, windows]`."""
    base = _windows(Which("unquantized", None, None, which.planted), rows)
    own = _windows(which, rows)
    return None if base is None or own is None else own - base


def _windows(which: Which, rows: Sequence[Row]) -> np.ndarray | None:
    found = [row["window_nll"] for row in rows if _is(which, row)]
    return np.asarray(found, np.float64) if found else None


def _is(which: Which, row: Mapping) -> bool:
    own = (row["name"], row["group"], row["inject"] is not None)
    same = own == (which.name, which.group, which.planted)
    return same and row["bits"] == which.bits


def _spread(losses: np.ndarray) -> float:
    """Standard deviation over seeds; 0 of one."""
    return float(losses.mean(axis=1).std(ddof=1)) if len(losses) > 1 else 0.0
