"""Tasks whose answers are programs: how they are cut, run apart from their tests, and counted."""

from __future__ import annotations

import gzip
import json
from contextlib import closing
from pathlib import Path

import pytest
from sandbox_escapes import pool_or_skip

from evals import Generated, Options, Store, build, evaluate
from evals.execution import Sandboxed
from evals.metrics import pass_at_k
from evals.results import read_rows
from evals.runner import run
from evals.store import key_of
from evals.task import Execute, Executed
from evals.tasks.code import cut, row, whole_program
from evals.tasks.mbpp import entry_point

HUMANEVAL = Path(__file__).parent.parent / ".." / "shared" / "data" / "evals" / "HumanEval.jsonl.gz"
PROBLEMS = [
    {
        "task_id": f"Own/{i}",
        "prompt": f'import math\n\n\ndef add{i}(a, b):\n    """The sum and {i}."""\n',
        "entry_point": f"add{i}",
        "test": f"def check(candidate):\n    assert candidate(1, 2) == {3 + i}\n"
        f"    assert add{i}(0, 0) == {i}\n",
    }
    for i in range(3)
]


@pytest.fixture(scope="module")
def sandboxed():
    pool_or_skip().close()
    backend = Sandboxed(workers=2)
    yield backend
    backend.close()


class Coder:
    """A model that answers each prompt with texts made before."""

    name, identity = "coder", {"coder": 1}

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def answer(self, requests, known):
        for place, request in enumerate(requests):
            self.asked.append(request)
            text = request.prompt or request.messages[0]["content"]
            texts = next(texts for key, texts in self.answers.items() if key in text)
            yield [(place, Generated(tuple(texts[: request.n]), ("stop",) * request.n))]

    def work(self):
        return {}

    def close(self):
        pass


def results(task, coder, sandboxed, tmp_path, **options):
    with Store(tmp_path / "out") as store:
        backends = {"subject": coder, "sandbox": sandboxed}
        return run([task], backends, store, Options(**options))[0]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return 1\n", "    return 1\n"),
        ("    return 1\ndef other():\n    pass", "    return 1"),
        ("    return 1\nclass A: pass", "    return 1"),
        ("    return 1\n# Test", "    return 1"),
        ("    return 1\nif __name__ == '__main__':", "    return 1"),
        ("    return 1\nprint(f(1))", "    return 1"),
        ("    def inner():\n        return 2\n    return inner()", None),
        ("    # a remark\n    return 1", None),
        (
            "    if a:\n        return 1\n\n\n\ndef g(): 0\nprint(1)",
            "    if a:\n        return 1\n\n\n",
        ),
        ("", ""),
    ],
)
def test_a_completion_ends_where_the_function_does(completion, kept):
    assert cut(completion) == (completion if kept is None else kept)


def test_a_chats_code_replaces_the_function_and_keeps_what_stands_before_it():
    prompt = PROBLEMS[0]["prompt"]
    whole = "def add0(a, b):\n    return a + b\n"
    fenced = f"Here it is:\n```python\n{whole}```\nIt adds."
    expected = f"import math\n\n\n{whole}".rstrip()
    assert whole_program(prompt, fenced, "add0", chat=True).rstrip() == expected
    assert whole_program(prompt, whole, "add0", chat=True).rstrip() == expected
    body = "```\n    return a + b\n```"
    assert whole_program(prompt, body, "add0", chat=True) == f"{prompt}    return a + b"
    compile(whole_program(prompt, "    return a\nprint(1", "add0", chat=False), "", "exec")


def test_humaneval_counts_right_samples_and_no_cheats(sandboxed, tmp_path):
    right = "    return a + b + {i}\n"
    samples = {
        "add0": [right.format(i=0), "    return 3\n", "    import os; os._exit(0)\n", "    pass\n"],
        "add1": [right.format(i=1)] * 2 + ["    while True: pass\n", "    return a +\n"],
        "add2": ["    print('x' * 10_000_000); return a + b + 2\n"] * 4,
    }
    coder, path = Coder(samples), write(tmp_path / "own.jsonl", PROBLEMS)
    given = {"humaneval.path": path, "humaneval.samples": 4, "humaneval.temperature": 0.8}
    [task] = build(["humaneval"], {**given, "humaneval.k": "1,2,10", "humaneval.seconds": "1"})
    found = results(task, coder, sandboxed, tmp_path)
    assert [row["passed"] for row in found.rows] == [1, 2, 0]
    assert [row["id"] for row in found.rows] == ["Own/0", "Own/1", "Own/2"]
    assert found.rows[0]["statuses"] == ["passed", "failed", "failed", "failed"]
    assert found.rows[1]["statuses"] == ["passed", "passed", "timeout", "failed"]
    assert set(found.rows[2]["statuses"]) == {"output"}
    assert set(found.estimates) == {"pass@1", "pass@2", "over_limits"}
    expected = sum(pass_at_k(4, c, 2) for c in (1, 2, 0)) / 3
    assert found.estimates["pass@2"].value == pytest.approx(expected)
    assert found.estimates["over_limits"].value == pytest.approx((0 + 1 / 4 + 1) / 3)
    assert len({request.seed for request in coder.asked}) == 3
    ran = sandboxed.work()["programs"]
    assert results(task, coder, sandboxed, tmp_path).rows == found.rows
    assert sandboxed.work()["programs"] == ran, "what is stored does not run again"


def test_humaneval_asks_chats_for_a_block_and_plain_models_for_a_body(sandboxed, tmp_path):
    path = write(tmp_path / "own.jsonl", PROBLEMS[:1])
    [task] = build(["humaneval"], {"humaneval.path": path})
    plain, chat = (
        Coder({"add0": ["    return a + b"]}),
        Coder({"add0": ["```python\ndef add0(a, b):\n    return math.fsum((a, b))\n```"]}),
    )
    found = results(task, plain, sandboxed, tmp_path)
    assert found.estimates["pass@1"].value == 1
    assert plain.asked[0].prompt == PROBLEMS[0]["prompt"]
    assert "\ndef" in plain.asked[0].until
    assert results(task, chat, sandboxed, tmp_path / "chat", chat=True).rows[0]["passed"] == 1
    assert chat.asked[0].until == ()
    assert "in one code block" in chat.asked[0].messages[0]["content"]


MBPP = [
    {
        "task_id": number,
        "prompt": f"Write a function to add {number}.",
        "code": f"def helper(x):\n  return x\ndef plus(x):\n  return helper(x) + {number}",
        "test_imports": ["import math"],
        "test_list": [f"assert plus(1) == {number + 1}", f"assert math.isclose(plus(0), {number})"],
    }
    for number in (2, 3, 4, 5, 11, 510, 600)
]


def test_mbpp_shows_three_solved_problems_and_runs_the_assertions(sandboxed, tmp_path):
    path = tmp_path / "mbpp.json"
    path.write_text(json.dumps(MBPP))
    [task] = build(["mbpp"], {"mbpp.path": str(path)})
    assert [example["id"] for example in task.examples()] == ["11", "510"]
    coder = Coder(
        {
            "add 11. Your": ["def plus(x):\n    return x + 11\n[DONE]\nmore"],
            "add 510. Your": ["def plus(x):\n    return x"],
        }
    )
    found = results(task, coder, sandboxed, tmp_path)
    assert [row["passed"] for row in found.rows] == [1, 0]
    assert "AssertionError" in found.rows[1]["reason"]
    prompt = coder.asked[0].prompt
    assert prompt.count("[DONE]") == 3
    assert [f"add {n}. Your" in prompt for n in (2, 3, 4, 5)] == [True, True, True, False]
    assert prompt.endswith("assert math.isclose(plus(0), 11)\n[BEGIN]\n")
    whole = build(["mbpp"], {"mbpp.path": str(path), "mbpp.all_rows": "true"})[0]
    assert len(whole.examples()) == len(MBPP)


def test_a_problem_that_does_not_say_its_function_is_named(sandboxed, tmp_path):
    assert entry_point(MBPP[0]) == "plus"
    assert entry_point({**MBPP[0], "entry_point": "other"}) == "other"
    rows = [{**MBPP[0], "task_id": 11, "test_list": ["assert True"]}]
    [task] = build(["mbpp"], {"mbpp.path": write(tmp_path / "odd.jsonl", rows)})
    with pytest.raises(ValueError, match=r"task mbpp, example 11: its tests call none of the func"):
        results(task, Coder({"": ["pass"]}), sandboxed, tmp_path, shots=0)
    with pytest.raises(ValueError, match="3 samples at temperature 0 are equal"):
        build(["humaneval"], {"humaneval.path": "x", "humaneval.samples": 3})


def test_a_plain_program_has_its_output(sandboxed):
    requests = [
        Execute("print(open('words').read())", files=(("words", "hello"),)),
        Execute("1 / 0"),
        Execute("pass", check="def check(candidate): pass", entry_point="f"),
    ]
    answers = dict(pair for group in sandboxed.answer(requests, {2}) for pair in group)
    assert sorted(answers) == [0, 1]
    assert (answers[0].status, answers[0].stdout) == ("passed", "hello\n")
    assert (answers[1].status, answers[1].stderr.splitlines()[-1]) == (
        *("failed", "ZeroDivisionError: division by zero"),
    )


def test_humanevals_own_solutions_pass_through_the_task(sandboxed, tmp_path):
    if not HUMANEVAL.is_file():
        pytest.skip("HumanEval.jsonl.gz is not beside the checkout")
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    coder = Coder({row["prompt"]: [row["canonical_solution"]] for row in rows})
    [task] = build(["humaneval"], {"humaneval.path": str(HUMANEVAL)})
    assert len(task.examples()) == 164
    found = results(task, coder, sandboxed, tmp_path, limit=12)
    assert found.estimates["pass@1"].value == 1.0
    assert found.estimates["pass@1"].n == 12


def test_an_evaluation_brings_its_own_sandbox(sandboxed, tmp_path):
    given = {"humaneval.path": write(tmp_path / "own.jsonl", PROBLEMS[:1])}
    coder = Coder({"add0": ["    return a + b"]})
    found = evaluate(coder, ["humaneval"], out=tmp_path / "out", settings=given, say=None)
    assert found["coder"]["tasks"]["humaneval"]["estimates"]["pass@1"].value == 1
    assert read_rows(tmp_path / "out" / "coder", "humaneval")[0]["statuses"] == ["passed"]


def test_a_weaker_sandbox_is_told_in_rows_and_never_shares_results():
    walls = ("landlock: the kernel offers none",)
    assert row([Executed("passed", weaker=walls)], [""])["weaker_sandbox"] == list(walls)
    assert "weaker_sandbox" not in row([Executed("passed")], [""])
    with closing(Sandboxed()) as full, closing(Sandboxed(allow_weaker=True)) as weaker:
        assert key_of(Execute("pass"), full.identity) != key_of(Execute("pass"), weaker.identity)
