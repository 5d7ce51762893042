"""The report's numbers against SciPy's, and that it holds all it needs and no text as markup."""

from __future__ import annotations

import html.parser
import json
import math
import re

import numpy as np
import pytest
import written_results as written
from scipy import stats

from evals.__main__ import main
from evals.comparing import draws_for
from evals.curves import correlations, curves, matrix
from evals.report import collect, render, write_html
from evals.report.markup import join, tag
from evals.report.plots import ticks

RIGHT = {
    "base": [1] * 30 + [0] * 30,
    "better": [1] * 50 + [0] * 10,
    "alike": [1] * 29 + [0] * 29 + [1] * 2,
}
LOST = {"base": 1.0, "better": 1.1, "alike": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models; the second is better at questions and worse on documents."""
    folder = tmp_path_factory.mktemp("report")
    noise = np.random.default_rng(0).normal(scale=0.02, size=(3, 30))
    for place, (name, right) in enumerate(RIGHT.items()):
        bits = LOST[name] + noise[0] + 0.2 * noise[place]
        results = [written.questions(right), written.documents(bits)]
        method = "train" if name == "base" else "rtn"
        written.model(folder / name, results, (16.0, 4.5, 3.5)[place], method)
    return folder


class Page(html.parser.HTMLParser):
    """Tables as text, plotted dots, and every tag and address."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.dots, self.tags, self.addresses, self.data = {}, [], [], [], ""
        self._rows, self._in = [], ""
        self.feed(text)

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        self.tags.append(name)
        self.addresses += [given[key] for key in ("src", "href", "action") if key in given]
        if name == "table":
            self._rows = self.tables.setdefault(given["class"], [])
        elif name == "tr":
            self._rows.append([])
        elif name in ("th", "td"):
            self._rows[-1].append("")
        elif "data-value" in given:
            self.dots.append((float(given["data-x"]), float(given["data-value"]), given))
        self._in = given.get("id", "") if name == "script" else ""

    def handle_data(self, text):
        if self._in == "data":
            self.data += text
        elif self._rows and self._rows[-1]:
            self._rows[-1][-1] += text

    def handle_endtag(self, name):
        if name == "table":
            self._rows = []


def test_marks_are_paired_tests_corrected_over_the_whole_table(folder):
    contents = collect([folder / name for name in RIGHT])
    found = {(m, c.task): c for m, each in contents.compared.items() for c in each}
    assert len(found) == 4
    raw = {key: each.comparison.p for key, each in found.items()}
    for name in ("better", "alike"):
        first, second = (np.asarray(RIGHT[key]) for key in ("base", name))
        only = int(((first == 0) & (second == 1)).sum()), int(((first == 1) & (second == 0)).sum())
        exact = stats.binomtest(min(only), sum(only), 0.5).pvalue
        assert raw[name, "questions"] == pytest.approx(exact)
        assert found[name, "questions"].comparison.difference == pytest.approx(
            (second - first).mean()
        )
    order = sorted(raw, key=raw.__getitem__)
    highest = 0.0
    for rank, key in enumerate(order):
        highest = max(highest, min(1.0, raw[key] * (len(order) - rank)))
        assert found[key].p == pytest.approx(highest), key
    page = Page(render(contents))
    rows = {(row[0], row[1]): row for row in page.tables["differences"][1:]}
    assert "▲" in rows["better", "questions"][5]
    assert "▼" in rows["better", "perplexity"][5]  # More bits a byte is worse.
    assert not set("▲▼") & set(rows["alike", "questions"][5])
    assert rows["better", "questions"][7] == "20 / 0"
    cells = {(row[0], row[1]): row[3:] for row in page.tables["results"][1:]}
    value, error = re.match(r"([\d.]+) ± ([\d.]+)", cells["questions", "acc"][1]).groups()
    assert (float(value), float(error)) == (
        pytest.approx(50 / 60, abs=1e-4),
        pytest.approx(stats.sem(RIGHT["better"]), abs=1e-4),
    )
    assert "significantly better" in cells["questions", "acc"][1]
    assert "significantly" not in cells["questions", "acc"][0]


def test_a_large_table_can_still_be_significant():
    """The bootstrap's least p times the tests must stay under the level."""
    for tests in (1, 10, 100, 1000):
        assert tests * 2 / (draws_for(tests) + 1) < 0.05


def test_plots_stand_where_their_values_are(folder):
    page = Page(render(collect([folder / name for name in RIGHT])))
    dots = sorted((x, value) for x, value, _ in page.dots)
    assert {x for x, _ in dots} == {3.5, 4.5}  # The first model is the line across.
    assert (4.5, pytest.approx(50 / 60)) in dots
    places = {}
    for x, value, given in page.dots:
        places.setdefault(x, float(given["cx"]))
        if x == 4.5 and value < 1:
            assert float(given["cy"]) < 270 / 2  # The better one stands high.
    assert places[3.5] < places[4.5]
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(low <= tick <= high for low, high in [(-3.3, 17.0), (1e-9, 3e-9)]
               for tick in ticks(low, high))  # fmt: skip


def test_the_file_holds_all_it_needs_and_no_text_becomes_markup(folder, tmp_path):
    contents = collect([folder])
    path = write_html(tmp_path / "deep" / "report.html", contents, title="<b>Mine</b>")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses
    assert all(each.startswith("data:") for each in page.addresses)
    assert page.tags.count("script") == 2
    assert not {"img", "iframe", "b", "link rel=stylesheet"} & set(page.tags)
    assert "innerHTML" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src &#x27;none&#x27;" in policy
    assert "unsafe" not in policy
    data = json.loads(page.data)
    answers = [
        answer["said"][0] for row in data["rows"] for answer in row["of"] if answer["parsed"]
    ]
    assert f"{written.EVIL} 1" in answers
    assert str(join("<", tag("i", "&", title='"'))) == '&lt;<i title="&quot;">&amp;</i>'


def test_examples_on_which_models_differ_come_first_and_cuts_are_said(folder):
    contents = collect([folder / name for name in RIGHT])
    data = json.loads(Page(render(contents, examples=7)).data)
    asked = [row for row in data["rows"] if data["tasks"][row["task"]]["name"] == "questions"]
    assert len(asked) == 7
    assert all(row["differ"] for row in asked)
    assert {"name": "questions", "shown": 7, "total": 60} in data["tasks"]
    assert data["models"] == list(RIGHT)
    assert [answer["outcome"] for answer in asked[0]["of"]].count("correct") in (1, 2)
    scored = next(row for row in data["rows"] if row["prompt"].startswith("document"))
    assert all(answer["score"] is not None for answer in scored["of"])


def test_a_sweep_has_its_curves_and_its_falls(tmp_path):
    hits = {1: [0] * 60, 2: [1] * 30 + [0] * 30, 3: [1] * 55 + [0] * 5, 4: [1] * 20 + [0] * 40}
    by_step = {step: [written.questions(right)] for step, right in hits.items()}
    folder = written.sweep(tmp_path / "run", by_step, [(3, "spike")])
    [curve] = curves(folder)
    assert [point.step for point in curve.falls] == [4]
    values = [float(np.mean(right)) for right in hits.values()]
    assert [each.value for each in curve.estimates] == pytest.approx(values)
    assert curve.trend == pytest.approx(stats.spearmanr(list(hits), values).statistic)
    raw = [1.0 if each is None else each.comparison.p for each in curve.changes[1:]]
    assert raw == pytest.approx([2 * 0.5**30, 2 * 0.5**25, 2 * 0.5**35])
    assert "0.3333" in matrix([curve])
    assert matrix([curve]).count("!") == 1
    page = Page(render(collect([folder])))
    assert sorted((x, value) for x, value, _ in page.dots) == [
        (float(step), pytest.approx(value)) for step, value in zip(hits, values, strict=True)
    ]
    assert "▼" in page.tables["matrix"][4][2]
    assert "4,000" in page.tables["matrix"][4][1]
    assert "▲" in page.tables["matrix"][3][2]
    assert len(json.loads(page.data)["models"]) == 4
    assert curve.emerges is None  # The last interval reaches down to chance.


def test_a_sweep_says_where_a_task_emerges_and_how_tasks_go_together(tmp_path):
    right = {1: 14, 2: 30, 3: 28, 4: 50}  # Of 60, where guessing has 15.
    by_step = {
        step: [written.questions([1] * n + [0] * (60 - n)), written.documents([5 / step, 4 / step])]
        for step, n in right.items()
    }
    folder = written.sweep(tmp_path / "run", by_step)
    found = {curve.task: curve for curve in curves(folder)}
    assert found["questions"].chance == 0.25
    assert found["questions"].emerges.step == 2
    assert found["perplexity"].emerges is None
    ranks = stats.spearmanr(list(right.values()), [-step for step in right]).statistic
    [(pair, value)] = correlations(list(found.values())).items()
    assert set(pair) == {"perplexity", "questions"}
    assert value == pytest.approx(ranks)
    assert "above chance from 2" in matrix(list(found.values()))
    page = Page(render(collect([folder])))
    assert page.tables["correlations"][1] == ["perplexity", "–", f"{ranks:+.2f}"]
    assert page.tables["matrix"][-1] == ["above chance from", "", "–", "2"]


def test_what_cannot_be_compared_is_said(folder, tmp_path, capsys):
    other = written.model(tmp_path / "base", [written.questions([1, 0], data="other")])
    contents = collect([folder / "base", other])
    assert [model.label for model in contents.models] == ["base", f"{tmp_path.name}/base"]
    assert not contents.compared
    assert "ran on other examples" in contents.notes[0]
    assert contents.models[1].bits is None
    assert math.isclose(contents.models[0].bits or 0, 16.0)
    shown = [str(folder / "base"), str(other), f"--html={tmp_path / 'r.html'}"]
    assert main(["report", *shown]) == 0
    assert "MB" in capsys.readouterr().out
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["report", str(empty)]) == 2
    assert "holds neither results.json nor sweep.json" in capsys.readouterr().err
    assert main(["report", str(other), f"--html={tmp_path / 'r.html'}", "--examples=-1"]) == 2
    assert "it must be 0 or more" in capsys.readouterr().err
