"""Answers that are read out of texts, and examples out of files."""

from __future__ import annotations

import datetime
import gzip
import json
import time
from decimal import Decimal

import pytest

from evals import extract
from evals.examples import read_examples, read_text
from evals.task import Scored
from evals.tasks.options import gold_index, picks

OPTIONS = ("red", "dark green", "blue", "green")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("**C**.", "C"),
        ("$\\boxed{D}$", "D"),
        ("The answer is A", "A"),
        ("The answer is (A) red.", "A"),
        ("the correct option is **b**", "B"),
        ("Answer: C", "C"),
        ("Answer: \\boxed{C}", "C"),
        ("First I thought the answer is A.\nBut no.\nThe answer is D.", "D"),
        ("The answer is B.\nThank you for asking", "B"),
        ("A long time ago\nthere was a king", None),
        ("The answer is E", None),
        ("The answer is dark green.", "B"),
        ("Answer: green", "D"),
        ("blue", "C"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_final_choice(text, letter):
    assert extract.choice(text, 4, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so it is 3 + 4 = 7\n#### 7", 7),
        ("#### 1,234,567", 1234567),
        ("#### -3", -3),
        ("#### $18.50", "18.5"),
        ("she has 2 apples and 5 pears", 5),
        ("thus \\boxed{1,000} of 3", 1000),
        ("it costs $4.00.", 4),
        ("−12 degrees", -12),
        ("no number", None),
    ],
)
def test_numbers(text, value):
    assert extract.number(text) == (None if value is None else Decimal(value))


def test_other_answers():
    assert extract.json_value('Sure: {"a": [1, "}"]} as asked') == {"a": [1, "}"]}
    assert extract.json_value("see [x] then [1, 2]") == [1, 2]
    assert extract.json_value("{“a”: 1}") == {"a": 1}
    assert extract.json_value("{ never closed") is None
    assert extract.fenced("Here:\n```python\nx = 1\n```\nDone") == "x = 1"
    assert extract.tagged("<x>no</x> and <x> yes </x>", "x") == "yes"
    assert [extract.yes_no(t) for t in ("Yes, it is", "No.", "Nothing")] == [True, False, None]
    assert extract.yes_no("Ja!", "de") is True
    assert extract.first_line("\n  found it \nmore") == "found it"
    assert [extract.outcome(g, "a") for g in ("a", "b", None)] == [
        "correct", "incorrect", "unparsed",
    ]  # fmt: skip


def test_codes_and_dates():
    said = ["ICD-10: C61", "c679, or better C67.9.", "E11.65", "no code", "vitamin B complex"]
    assert [extract.icd10(each) for each in said] == ["C61", "C67.9", "E11.65", None, None]
    march = datetime.date(2024, 3, 9)
    for text in ("2024-03-09", "on 9.3.2024.", "9 March 2024", "Mar. 9th, 2024", "3/9/2024"):
        assert extract.date(text) == march, text
    assert extract.date("3/9/2024", day_first=True) == datetime.date(2024, 9, 3)
    assert extract.date("born 1.2.1950, seen 9.3.2024") == march
    assert extract.date("9.3.2024, never 30.2.2024") == march
    assert extract.date("in 2024, 12 of 13") is None


@pytest.mark.parametrize("text", ["((((" * 20000, "1," * 50000, "[" * 50000, "answer is " * 20000,
                                  "9.3." * 20000])  # fmt: skip
def test_no_text_takes_long(text):
    began = time.process_time()
    reads = (extract.number, extract.json_value, extract.date, extract.icd10)
    for read in (lambda t: extract.choice(t, 26, OPTIONS), *reads):
        read(text)
    assert time.process_time() - began < 1.0


def test_a_broken_file_names_its_line(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"question": "a", "answer": 1}, {"id": "x", "question": "b", "answer": 2}]
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows)).encode()))
    assert [row["id"] for row in read_examples(path, ["question"])] == [0, "x"]
    broken = tmp_path / "broken.jsonl"
    for content, said in [
        ('{"a": 1}\n{"a": ', r"line 2 is not JSON"),
        ('{"a": 1}\n\n3', r"line 3: is a int"),
        ('{"answr": 1}', r"line 1: lacks the field 'answer'; nearest: 'answr'"),
    ]:
        broken.write_text(content)
        with pytest.raises(ValueError, match=said):
            read_examples(broken, [] if "answr" not in content else ["answer"])
    with pytest.raises(ValueError, match="nearest there: broken"):
        read_text(tmp_path / "brokn.jsonl")
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="utf-8"):
        read_text(broken)


def test_options_are_picked_by_each_score():
    options = [" a", " bbbbbbbb", " éé"]
    answers = [Scored(-2.0, False, 1), Scored(-4.0, False, 4), Scored(-3.0, False, 2)]
    after_nothing = [Scored(-1.0, False, 1), Scored(-9.0, False, 4), Scored(-3.0, False, 2)]
    assert picks(options, answers + after_nothing) == {
        "acc": 0, "acc_norm": 1, "acc_bytes": 1, "acc_tokens": 1, "acc_mi": 1,
    }  # fmt: skip
    assert "acc_mi" not in picks(options, answers)
    assert [gold_index(v, ["x", "y"]) for v in (1, "1", "b", "y")] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="none of the 2 options"):
        gold_index("C", ["x", "y"])
