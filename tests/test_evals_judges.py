"""Judges: what they say is read strictly, in both orders, and what is known of them is told."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from evals import Generated, Store, build
from evals.judges import (
    WINNERS,
    agreement,
    checks,
    length_preference,
    position_share,
    preference,
    score,
    verdict,
)
from evals.runner import run

PANDALM = Path(__file__).parent.parent / ".." / "shared" / "data" / "evals" / "pandalm"


@pytest.mark.parametrize(
    ("straight", "turned", "winner", "flipped"),
    [
        ("first", "second", "first", False),
        ("second", "first", "second", False),
        ("first", "first", "tie", True),
        ("second", "second", "tie", True),
        ("tie", "tie", "tie", False),
        ("first", "tie", "tie", False),
        ("first", "unparsed", "unparsed", False),
    ],
)
def test_only_what_both_orders_say_wins(straight, turned, winner, flipped):
    found = preference(straight, turned)
    assert (found.winner, found.flipped) == (winner, flipped)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It is shorter.\nVerdict: 2", "second"),
        ("**Verdict:** Tie", "tie"),
        ("Verdict: 1? No.\nVerdict: 2.", "second"),
        ("1\nbecause", "first"),
        ("Response 1 is better", None),
        ("Verdict: 12", None),
        ("", None),
    ],
)
def test_verdicts_are_read_or_not(text, said):
    assert verdict(text) == said


def test_grades_and_lists_are_read_or_not():
    said = ["Good. **Score:** 4", "3", "Score: 9", "Score: -1", "Score: 4.5", "4 or 5", "none"]
    assert [score(each, 1, 5) for each in said] == [4, 3, None, None, None, None, None]
    assert checks("1: yes\n2. No, it is long", 2) == (True, False)
    assert checks("1: yes\n1: no\n2: yes", 2) == (False, True)
    assert checks("1: yes", 2) is None


class Scripted:
    """A model whose answers a function of the request gives."""

    def __init__(self, name, say):
        self.name, self.say, self.asked = name, say, []
        self.identity = {"scripted": 1}

    def answer(self, requests, known):
        for place, request in enumerate(requests):
            self.asked.append(request)
            yield [(place, Generated((self.say(request),), ("stop",)))]

    def work(self):
        return {}

    def close(self):
        pass


def write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def results(tmp_path, judge, **settings):
    [task] = build(["judged"], {f"judged.{name}": value for name, value in settings.items()})
    subject = Scripted("subject", lambda request: f"answer to {request.prompt}")
    with Store(tmp_path / "out") as store:
        [found] = run([task], {"subject": subject, "judge": judge}, store)
    return found


def test_pairs_are_asked_in_both_orders_and_what_is_unclear_again(tmp_path):
    """Of five questions one is won, one lost, one goes by the place, one is read at the second
    try, and one never.
    """
    tries = Counter()

    def say(request):
        text = request.messages[0]["content"]
        question = text.partition("Task:\n")[2].partition("\n")[0]
        ours_first = "Response 1:\nanswer to" in text
        tries[question, ours_first] += 1
        if question == "unclear" or (question == "twice" and tries[question, ours_first] == 1):
            return "hm"
        if question == "place":
            return "Verdict: 1"
        won = question != "lost"
        return f"Verdict: {1 if won == ours_first else 2}"

    rows = [
        {"prompt": p, "answer": "{first}"} for p in ("won", "lost", "place", "twice", "unclear")
    ]
    judge = Scripted("judge", say)
    found = results(tmp_path, judge, path=write(tmp_path, rows))
    assert [row["parsed"] for row in found.rows] == ["first", "second", "tie", "first", None]
    values = {name: each.value for name, each in found.estimates.items()}
    assert values["win_rate"] == pytest.approx((1 + 0 + 0.5 + 1 + 0) / 5)
    assert values["flip_rate"] == pytest.approx(1 / 4)
    assert values["unparsed"] == pytest.approx(1 / 5)
    assert values["position_share"] == pytest.approx(5 / 8)
    assert values["length_preference"] == pytest.approx(2 / 3)
    assert tries["unclear", True] == tries["unclear", False] == 4
    assert tries["twice", True] == 2
    assert "Response 2:\n{first}\n" in judge.asked[0].messages[0]["content"]
    first, again = judge.asked[0], [each for each in judge.asked if each.temperature > 0]
    assert (first.temperature, first.seed) == (0.0, None)
    assert all(each.seed is not None for each in again)
    assert len({each.seed for each in again}) > 1


def test_grades_and_lists_become_scores(tmp_path):
    rows = [{"prompt": p, "requirements": ["short", "polite"]} for p in ("a", "b")]
    path = write(tmp_path, rows)
    by = {"a": "1: yes\n2: no", "b": "1: yes\n2: yes"}
    judge = Scripted("judge", lambda request: by[request.prompt.split("Task:\n")[1][0]])
    kept = results(tmp_path, judge, path=path, mode="checklist", judge_chat="false").estimates
    assert (kept["kept"].value, kept["all_kept"].value) == (0.75, 0.5)
    by |= {"a": "Score: 7", "b": "great"}
    grades = results(tmp_path / "2", judge, path=path, mode="pointwise", judge_chat=False,
                     highest=10).estimates  # fmt: skip
    assert (grades["score"].value, grades["unparsed"].value) == (4.0, 0.5)


def test_a_task_that_needs_a_judge_says_so(tmp_path):
    [task] = build(["judged"], {"judged.path": write(tmp_path, [{"prompt": "a", "answer": "b"}])})
    subject = Scripted("subject", lambda request: "x")
    with Store(tmp_path / "out") as store, pytest.raises(ValueError, match="asks for a judge"):
        run([task], {"subject": subject}, store)


def test_released_judges_like_long_answers_as_recomputed():
    if not PANDALM.is_dir():
        pytest.skip("the released PandaLM files are not here")

    def rows(name):
        return json.loads(gzip.decompress((PANDALM / f"{name}-v1.json.gz").read_bytes()))

    def winners(values):
        named = {"1": "first", "2": "second"}
        return [named.get(str(value), "tie") for value in values]

    people = rows("testset")
    by_people = [[row[f"annotator{i}"] for i in (1, 2, 3)] for row in people]
    gold = winners(Counter(each).most_common(1)[0][0] for each in by_people)
    gpt = winners(row["gpt_result"] for row in rows("gpt-3.5-turbo-testset"))
    panda = winners(row["pandalm_result"] for row in rows("pandalm-7b-testset"))
    lengths = [(len(str(row["response1"])), len(str(row["response2"]))) for row in people]
    found = [length_preference(lengths, each) for each in (gold, gpt, panda)]
    assert found[0].n == 887
    assert [each.value for each in found] == pytest.approx([0.675, 0.619, 0.655], abs=5e-4)
    longer = [WINNERS[int(a <= b)] for a, b in lengths]
    assert agreement(gold, longer)["acc"].value == pytest.approx(0.6016, abs=5e-5)
    assert agreement(gold, ["second"] * 999)["acc"].value == pytest.approx(0.4725, abs=5e-5)
    assert agreement(gold, gpt)["kappa"].value == pytest.approx(0.495784, abs=5e-7)
    assert position_share(gold).value == pytest.approx(422 / 894)
