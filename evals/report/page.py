"""The page: `page.html` with the tables, plots and examples in it."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from pathlib import Path

from evals.comparing import headline
from evals.curves import Curve
from evals.report import tables
from evals.report.contents import Contents, Model
from evals.report.examples import embedded, example_data
from evals.report.markup import Markup, join, tag
from evals.report.plots import Dot, Line, legend, plot
from evals.task import Estimate
from model.checkpoint_folder import write_bytes

HOLE = re.compile(r"<!--(\w+)-->")
NOTHING_ELSE = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:"


def write_html(
    path: str | Path, contents: Contents, *, title: str = "Evaluation", examples: int = 500
) -> Path:
    """Write the report; a reader sees the old or the new one, never a part.

    examples: of each task at most. Raises `ValueError` for fewer than 0.
    """
    path = Path(path)
    page = render(contents, title, examples)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page.encode("utf-8", "replace"))
    return path


def render(contents: Contents, title: str = "Evaluation", examples: int = 500) -> str:
    """The page as text."""
    if examples < 0:
        raise ValueError(f"examples is {examples}; it must be 0 or more")
    source = importlib.resources.files("evals.report").joinpath("page.html").read_text("utf-8")
    parts = {
        "title": join(title),
        "policy": join(_policy(source)),
        "content": join(*_models(contents), *_bits(contents), *_sweeps(contents)),
        "data": embedded(example_data(contents.browsed, examples)),
    }
    return HOLE.sub(lambda hole: parts[hole[1]], source)


def _policy(source: str) -> str:
    """What the page may do: its own style and script, by their hashes, and nothing else."""
    hashes = []
    for name in ("style", "script"):
        inner = re.findall(rf"<{name}>(.*?)</{name}>", source, flags=re.DOTALL)[0]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        hashes.append(f"{name}-src 'sha256-{digest}'")
    return "; ".join([NOTHING_ELSE, *hashes])


def _section(name: str, title: str, *parts: str) -> Markup:
    return tag("section", tag("h2", title), *parts, id=name)


def _models(contents: Contents) -> list[Markup]:
    if not contents.models:
        return []
    first = contents.models[0].label
    hint = tag(
        "p",
        f"Value ± standard error; the bar is the 95 % interval. ▲ better and ▼ worse than {first}, "
        "p < 0.05 in a paired test after Holm's correction over all comparisons below.",
        class_="hint",
    )
    found = [_section("results", "Results", hint, tables.results_table(contents))]
    if contents.compared or contents.notes:
        heading = f"Paired differences against {first}"
        notes = [tag("p", f"{note}.", class_="hint") for note in contents.notes]
        table = tables.differences_table(contents)
        found.append(_section("differences", heading, table, *notes))
    return found


def _bits(contents: Contents) -> list[Markup]:
    """A plot a task, if models of two or more sizes of a weight were measured on it."""
    known = [model for model in contents.models if model.bits is not None]
    base, others = known[:1], known[1:]
    methods = list(dict.fromkeys(model.method for model in others))
    names = sorted({name for model in known for name in model.results["tasks"]})
    plots = []
    for name in names:
        mine = [model for model in known if name in model.results["tasks"]]
        if len({model.bits for model in mine}) > 1:
            plots.append(_over_bits(name, base[0], mine, methods))
    if not plots:
        return []
    names_of = legend([(method or "unnamed", i) for i, method in enumerate(methods)])
    hint = tag(
        "p",
        f"Bits of what is stored, scales and zeros included. The line across is {known[0].label} "
        f"at {known[0].bits:.3g} bits with its 95 % interval.",
        class_="hint",
    )
    return [_section("bits", "Over bits a weight", hint, names_of, _grid(plots))]


def _over_bits(name: str, base: Model, models: list[Model], methods: list[str]) -> Markup:
    metric = headline(models[0].results["tasks"][name])
    estimates = {m.label: m.results["tasks"][name]["estimates"].get(metric) for m in models}
    dots = {
        model.label: _dot(
            float(model.bits or 0.0), estimate, f"{model.label}, {model.bits:.3f} bits"
        )
        for model in models
        if (estimate := estimates[model.label]) is not None
    }
    lines = []
    for colour, method in enumerate(methods):
        mine = [m for m in models if m is not base and m.method == method and m.label in dots]
        found = tuple(sorted((dots[m.label] for m in mine), key=lambda dot: dot.x))
        lines += [Line(method, found, colour)] if found else []
    return plot(name, lines, "bits a weight", metric, level=dots.get(base.label))


def _sweeps(contents: Contents) -> list[Markup]:
    if not contents.series:
        return []
    names = sorted({curve.task for each in contents.series for curve in each.curves})
    marks = [
        (float(step), f"{kind} at step {step}, {each.label}")
        for each in contents.series
        for step, kind in each.sweep.incidents
    ]
    plots = []
    for name in names:
        curves = [
            (number, each.label, curve)
            for number, each in enumerate(contents.series)
            for curve in each.curves
            if curve.task == name
        ]
        lines = [_curve(curve, label, number) for number, label, curve in curves]
        plots.append(plot(name, lines, "step", curves[0][2].metric, band=True, marks=marks))
    of = legend([(each.label, number) for number, each in enumerate(contents.series)])
    found = [_section("steps", "Over training steps", of, _grid(plots))]
    hint = tag(
        "p",
        "▲ better and ▼ worse than the checkpoint before, p < 0.05 in a paired test after Holm's "
        "correction over this table; trend is Spearman's correlation of value and step.",
        class_="hint",
    )
    for number, each in enumerate(contents.series):
        shown = [tables.matrix_table(each)]
        if len(each.curves) > 1 and len(each.sweep.points) > 2:
            told = "How the tasks' values go together over the checkpoints (Spearman)."
            shown += [tag("p", told, class_="hint"), tables.correlations_table(each)]
        found.append(_section(f"sweep-{number}", f"Checkpoints of {each.label}", hint, *shown))
    return found


def _curve(curve: Curve, label: str, colour: int) -> Line:
    dots = []
    for point, estimate in zip(curve.points, curve.estimates, strict=True):
        tokens = "" if point.tokens is None else f", {point.tokens:,} tokens"
        dots.append(_dot(float(point.step), estimate, f"{label}, step {point.step:,}{tokens}"))
    return Line(label, tuple(dots), colour)


def _dot(x: float, estimate: Estimate, where: str) -> Dot:
    told = f"{where}: {estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
    return Dot(x, estimate.value, estimate.low, estimate.high, told)


def _grid(plots: list[Markup]) -> Markup:
    return tag("div", *(tag("figure", each) for each in plots), class_="plots")
