"""The tasks that come with Sheaf: solvable, fixed by their seeds, clear about wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evals import Generated, Loglikelihood, Options, Scored, Store, build
from evals.registry import TASKS, chosen, coverage, options
from evals.runner import run

DATA = Path(__file__).parent.parent / ".." / "shared" / "data" / "evals"
GENERATED = [name for name in TASKS if "path" not in options(name)]


class Solver:
    """Answers generated tasks by reading their prompts; the likeliest option is `choose`'s."""

    name, identity = "solver", {"solver": 1}

    def __init__(self, choose=lambda request: 0.0):
        self.choose, self.asked = choose, []

    def answer(self, requests, known):
        self.asked += requests
        for place, request in enumerate(requests):
            if isinstance(request, Loglikelihood):
                yield [(place, Scored(self.choose(request), False, 1))]
            else:
                yield [(place, Generated((f" {solve(request.prompt)}\nmore",), ("stop",)))]

    def work(self):
        return {}

    def close(self):
        pass


def solve(prompt):
    """The right answer, from the prompt alone."""
    if found := re.findall(r"The pass key is (\d+)", prompt):
        return found[0]
    if found := re.match(r"Count from (\d+) to (\d+)", prompt):
        return ", ".join(map(str, range(int(found[1]) + 3, int(found[2]) + 1)))
    if found := re.search(r"What is the value of (\w+)\?", prompt):
        return re.search(rf"The value of {found[1]} is (\w+)\.", prompt)[1]
    if found := re.findall(r"Where is (?:the )?(\w+)\?", prompt):
        return place_of(prompt.rpartition("\n\n")[2], found[-1])
    pairs = re.findall(r"Input: (.*)\nOutput: (.*)", prompt)
    query = re.findall(r"Input: (.*)", prompt)[-1]
    if found := re.match(r"Replace (\w+) by (\w+)\.", prompt):
        return " ".join(found[2] if word == found[1] else word for word in query.split())
    if prompt.startswith("Write words"):
        return query.lower()
    given, answer = pairs[0]
    if given in answer:
        head, _, tail = answer.partition(given)
        return query * 2 if tail == given and not head else head + query + tail
    return query[: len(answer)]


def place_of(story, who):
    holder = re.search(rf"(\w+) took the {who}\.", story)
    return re.findall(rf"{holder[1] if holder else who} went to the (\w+)\.", story)[-1]


def results(tasks, tmp_path, solver=None, **chosen):
    with Store(tmp_path / "out") as store:
        return run(tasks, {"subject": solver or Solver()}, store, Options(**chosen))


def test_a_solver_gets_every_generated_task_right(tmp_path):
    tasks = build([*GENERATED, "iq_string_replacement@case"],
                  {"iq_string_replacement@case.case": "true"})  # fmt: skip
    for each in results(tasks, tmp_path, limit=60):
        estimate = next(iter(each.estimates.values()))
        assert (estimate.value, estimate.n) == (1.0, 60), each.task.name
        assert {row["outcome"] for row in each.rows} == {"correct"}


def test_generated_tasks_follow_from_their_seed_alone():
    for name in GENERATED:
        one, again, other = (TASKS[name](seed=seed).examples() for seed in (1, 1, 2))
        assert list(one) == list(again)
        assert one[0] != other[0]
        assert len({str(row["id"]) for row in one}) == len(one)
        if "samples" in options(name) and name != "needle":
            assert list(TASKS[name](seed=1, samples=7).examples()) == list(one)[:7]


def test_a_needle_lies_at_its_depth():
    [task] = build(["needle"], {"needle.words": "200", "needle.depths": "0,1", "needle.samples": 1})
    first, last = task.examples()
    from evals.tasks.needle import text

    prompts = [text(e["words"], e["depth"], e["key"]) for e in (first, last)]
    places = [prompt.index("The pass key is") / len(prompt) for prompt in prompts]
    assert places[0] < 0.2
    assert places[1] > 0.8
    assert all(200 < len(prompt.split()) < 260 for prompt in prompts)


def test_limit_and_other_tasks_change_no_question(tmp_path):
    [task] = build(["iq_one_fact"], seed=3)
    few = results([task], tmp_path / "few", limit=5)[0].rows
    more = results(build(["needle", "iq_one_fact"], seed=3), tmp_path / "more", limit=9)[1].rows
    assert few == more[:5]


def test_symbols_stand_for_their_labels_in_no_text(tmp_path):
    folder = tmp_path / "trec"
    folder.mkdir()
    lines = [f"{label}:x What is number {i} ?" for i, label in enumerate(["NUM", "HUM", "LOC"] * 4)]
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    names = ["iq_symbol_trec", "iq_symbol_trec@unexplained"]
    given = {f"{name}.path": str(folder) for name in names}
    for seed in range(8):
        tasks = build(names, {**given, "iq_symbol_trec@unexplained.mode": "unexplained"}, seed)
        solver = Solver(by_explanation)
        mapped, hidden = results(tasks, tmp_path / str(seed), solver)
        assert mapped.estimates["acc_tokens"].value == 1.0
        symbols = {r.continuation.strip() for r in solver.asked if isinstance(r, Loglikelihood)}
        assert len(symbols) >= 6
        assert all(10 <= len(s) - 1 <= 11 and s not in "\n".join(lines) for s in symbols)
        assert " is person" not in hidden.rows[0]["prompt"]


def by_explanation(request):
    """The likelihood of a symbol for one who reads the explanation and knows the answers."""
    if " is person" not in request.context:
        return -1.0
    kinds = ["number", "person", "place"]
    number = int(re.findall(r"number (\d+)", request.context)[-1])
    return (
        0.0 if f"{request.continuation.strip()} is {kinds[number % 3]}" in request.context else -1.0
    )


def test_questions_by_letter_and_by_text(tmp_path):
    path = tmp_path / "mc.jsonl"
    rows = [
        {"id": f"q{i}", "question": f"Which is {i}?", "options": ["0", "1", "2"], "answer": i % 3}
        for i in range(6)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    names = ["multiple_choice@text", "multiple_choice@letter"]
    given = {f"{name}.path": str(path) for name in names}
    given |= {"multiple_choice@letter.style": "letter", "multiple_choice@letter.shots": "2"}
    solver = Solver(lambda request: -len(request.context) - ord(request.continuation[-1]))
    text, letter = results(build(names, given), tmp_path, solver)
    assert set(text.estimates) == {"acc", "acc_norm", "acc_bytes", "acc_tokens", "acc_mi"}
    assert text.estimates["acc"].value == pytest.approx(2 / 6)
    prompt = letter.rows[1]["prompt"]
    assert prompt.count("Answer:") == 3
    assert prompt.startswith("Question: Which is 0?\nA. 0\nB. 1\nC. 2\nAnswer: A\n\n")
    assert prompt.count("Which is 1?") == 1
    rows[3]["answer"] = 7
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="multiple_choice@text, example q3: the right answer 7"):
        results(build(names, given), tmp_path, solver)


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        (["perplexty"], {}, "no task 'perplexty'; nearest: perplexity"),
        (["perplexity"], {}, "needs --perplexity.path="),
        (["needle"], {"needle.word": 3}, "no setting 'word'; nearest: words"),
        (["needle"], {"needle.words": "many"}, "setting needle.words is 'many'"),
        (["needle"], {"iq_counting.seed": 3}, "belongs to no task"),
        (["multiple_choice"], {"multiple_choice.style": "roman"}, "style is 'roman'"),
    ],
)
def test_wrong_names_and_settings_are_named(names, given, said):
    with pytest.raises(ValueError, match=said):
        build(names, given)


def test_every_task_has_a_place_and_can_be_found_by_it():
    counts = [int(n) for n in re.findall(r"\| (\d+) \|", coverage(list(TASKS)))]
    assert sum(counts) == len(TASKS)
    assert set(chosen({"category": "computer science"})) == {"humaneval", "mbpp"}
    assert chosen({"evaluation": "ME", "group": "alignment"}) == ["judged"]
    with pytest.raises(ValueError, match="no 'categry'; nearest: category"):
        chosen({"categry": "reasoning"})


def test_published_files_are_read():
    if not DATA.is_dir():
        pytest.skip("the benchmarks' files are not here")
    gsm8k, trec, polarity = build(
        ["gsm8k", "classification_trec", "classification_polarity"],
        {"gsm8k.path": DATA / "gsm8k", "classification_trec.path": DATA / "trec",
         "classification_polarity.path": DATA / "sentence_polarity"},
    )  # fmt: skip
    from evals.extract import number

    assert [len(task.examples()) for task in (gsm8k, trec)] == [1319, 500]
    assert all(number(row["answer"]) is not None for row in gsm8k.examples())
    assert len(trec.fewshot()) > 5400
    asked = polarity.examples()
    assert [row["class"] for row in asked[:4]] == ["negative", "positive"] * 2
    shown = {row["id"] for row in polarity.fewshot()}
    assert len(asked) > 9000
    assert not shown & {row["id"] for row in asked}
