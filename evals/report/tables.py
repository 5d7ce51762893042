"""The report's tables: models by metrics, paired differences, checkpoints by tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from evals.comparing import Compared, headline, lower_is_better
from evals.curves import LEVEL, Curve, correlations, worse
from evals.report.contents import Contents, Series
from evals.report.markup import Markup, join, tag
from evals.report.plots import interval
from evals.task import Estimate


def results_table(contents: Contents) -> Markup:
    """A row a metric, a column a model: value, standard error, interval, and a mark where the model
    differs from the first one. Only the first metric of a task shows until all are asked for.
    """
    models = contents.models
    first = [tag("th", text, scope="col") for text in ("task", "metric", "n")]
    head = [*first, *(tag("th", model.label, scope="col") for model in models)]
    return _table("results", head, list(_result_rows(contents)))


def _result_rows(contents: Contents) -> Iterator[Markup]:
    names = sorted({name for model in contents.models for name in model.results["tasks"]})
    for name in names:
        tasks = [model.results["tasks"].get(name) for model in contents.models]
        main = headline(next(task for task in tasks if task is not None))
        metrics = dict.fromkeys(key for task in tasks if task for key in task["estimates"])
        for metric in metrics:
            found = [None if task is None else task["estimates"].get(metric) for task in tasks]
            scale = _scale([each for each in found if each is not None])
            cells = [
                _cell(each, scale, _of(contents, model.label, name) if metric == main else None)
                for each, model in zip(found, contents.models, strict=True)
            ]
            count = next(str(each.n) for each in found if each is not None)
            row = [tag("th", name, scope="row"), tag("td", metric), tag("td", count, class_="num")]
            yield tag("tr", *row, *cells, class_=None if metric == main else "sub")


def _of(contents: Contents, label: str, task: str) -> Compared | None:
    return next((each for each in contents.compared.get(label, ()) if each.task == task), None)


def _scale(estimates: list[Estimate]) -> tuple[float, float]:
    ends = [y for e in estimates for y in (e.low, e.value, e.high) if math.isfinite(y)]
    return (min(ends), max(ends)) if ends else (0.0, 1.0)


def _cell(
    estimate: Estimate | None, scale: tuple[float, float], compared: Compared | None
) -> Markup:
    if estimate is None:
        return tag("td", tag("span", "–", class_="soft"), class_="num")
    parts = [tag("span", f"{estimate.value:.4f}", class_="value")]
    if math.isfinite(estimate.se):
        parts.append(tag("span", f" ± {estimate.se:.4f}", class_="soft"))
    if compared is not None:
        parts.append(mark(compared))
    parts.append(interval(estimate.value, estimate.low, estimate.high, scale))
    hint = f"95 %: {estimate.low:.4f} to {estimate.high:.4f} ({estimate.method})"
    return tag("td", *parts, class_="num", title=hint)


def mark(compared: Compared) -> Markup:
    """▲ significantly better, ▼ significantly worse, nothing otherwise."""
    if not compared.p < LEVEL:
        return Markup("")
    sign, word = ("▼", "worse") if worse(compared) else ("▲", "better")
    hint = f"significantly {word}: p = {compared.p:.3g} after Holm"
    return tag("span", tag("span", hint, class_="unseen"), sign, class_=f"mark-{word}", title=hint)


def differences_table(contents: Contents) -> Markup:
    """Every comparison with the first model."""
    names = ("model", "task", "compared", "first", "model", "difference", "95 %")
    head = [*names, "better / worse", "p", "p (Holm)", "test"]
    rows = [
        _difference(label, each) for label, found in contents.compared.items() for each in found
    ]
    return _table("differences", [tag("th", name, scope="col") for name in head], rows)


def _difference(label: str, each: Compared) -> Markup:
    c = each.comparison
    numbers = [
        f"{c.first:.4f}",
        f"{c.second:.4f}",
        join(f"{c.difference:+.4f} ± {c.se:.4f} ", mark(each)),
        f"{c.low:+.4f} to {c.high:+.4f}",
        f"{c.worse} / {c.better}" if lower_is_better(each.metric) else f"{c.better} / {c.worse}",
        f"{c.p:.3g}",
        f"{each.p:.3g}",
    ]
    cells = [tag("td", number, class_="num") for number in numbers]
    texts = [tag("td", each.task), tag("td", each.metric)]
    return tag("tr", tag("th", label, scope="row"), *texts, *cells, tag("td", c.method))


def matrix_table(series: Series) -> Markup:
    """Checkpoints by tasks, marked where one differs from the checkpoint before."""
    curves = series.curves
    tops = [join(curve.task, tag("br"), tag("small", curve.metric)) for curve in curves]
    head = [tag("th", text, scope="col") for text in ("step", "tokens seen", *tops)]
    scales = [_scale(list(curve.estimates)) for curve in curves]
    rows = []
    for point in series.sweep.points:
        tokens = "–" if point.tokens is None else f"{point.tokens:,}"
        first = [tag("th", f"{point.step:,}", scope="row"), tag("td", tokens, class_="num")]
        cells = [_at(curve, point.step, scale) for curve, scale in zip(curves, scales, strict=True)]
        rows.append(tag("tr", *first, *cells))
    trends = [
        tag("td", "–" if math.isnan(curve.trend) else f"{curve.trend:+.3f}", class_="num")
        for curve in curves
    ]
    since = [tag("td", str(c.emerges.step) if c.emerges else "–", class_="num") for c in curves]
    last = [tag("th", "trend", scope="row", title="Spearman, value and step"), tag("td", "")]
    chance = "the first of three checkpoints in a row whose intervals lie above chance"
    first_above = [tag("th", "above chance from", scope="row", title=chance), tag("td", "")]
    ends = [tag("tr", *last, *trends), tag("tr", *first_above, *since)]
    return _table("matrix", head, [*rows, *ends])


def correlations_table(series: Series) -> Markup:
    """How the tasks' values go together over the checkpoints."""
    pairs, names = correlations(series.curves), [curve.task for curve in series.curves]
    both = {**pairs, **{(other, one): value for (one, other), value in pairs.items()}}
    rows = []
    for one in names:
        values = [both.get((one, other), math.nan) for other in names]
        cells = ["–" if math.isnan(value) else f"{value:+.2f}" for value in values]
        shown = [tag("td", cell, class_="num") for cell in cells]
        rows.append(tag("tr", tag("th", one, scope="row"), *shown))
    head = [tag("th", name, scope="col") for name in ("Spearman", *names)]
    return _table("correlations", head, rows)


def _at(curve: Curve, step: int, scale: tuple[float, float]) -> Markup:
    steps = [point.step for point in curve.points]
    if step not in steps:
        return _cell(None, scale, None)
    place = steps.index(step)
    return _cell(curve.estimates[place], scale, curve.changes[place])


def _table(kind: str, head: list[Markup], rows: list[Markup]) -> Markup:
    made = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), class_=kind)
    return tag("div", made, class_="wide", tabindex="0", role="group", aria_label=kind)
