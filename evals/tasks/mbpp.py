"""MBPP: short Python problems with three assertions each (Austin et al. 2021, arXiv 2108.07732).

Any file of such rows will do: `task_id`, `prompt` (or `text`), `test_list`, and `code`, the model
solution, which shots are made of and from which the function's name is read.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

from evals.examples import read_examples
from evals.extract import fenced
from evals.task import Context, Coroutine, Example, Execute, Task
from evals.tasks.code import ask, identified, pass_at, row
from evals.taxonomy import Place

SHOTS = ("2", "3", "4")
TESTED = range(11, 511)
"""Ids of the paper's test split."""
END = "[DONE]"


def mbpp(
    path: str,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 0.95,
    max_tokens: int = 512,
    k: tuple[int, ...] = (1, 10, 100),
    seconds: float = 3.0,
    all_rows: bool = False,
) -> Task:
    """path: `sanitized-mbpp.json`, or a file of such rows.

    Examples are the rows with ids 11 to 510, shots those with ids 2, 3 and 4; with `all_rows`
    every row is an example, and shots are the first ones. For the rest see `humaneval`.
    """
    if samples > 1 and temperature <= 0:
        raise ValueError(f"mbpp: {samples} samples at temperature 0 are equal; set it above 0")

    def rows() -> list[Example]:
        return identified(read_examples(path, ("task_id", "test_list", "code")))

    def tested() -> Sequence[Example]:
        return [each for each in rows() if all_rows or int(each["task_id"]) in TESTED]

    def shown() -> Sequence[Example]:
        return [each for each in rows() if all_rows or each["id"] in SHOTS]

    def run(example: Example, context: Context) -> Coroutine:
        shots = [f"{_question(each)}{each['code']}\n{END}\n\n" for each in context.fewshot]
        prompt = "".join(shots) + _question(example)
        options = {"temperature": temperature, "top_p": top_p if temperature else 1.0}
        stops = () if context.chat else (END,)
        [answer] = yield [
            ask(context, prompt, samples, max_tokens=max_tokens, until=stops, **options)
        ]
        programs = [_code(text) for text in answer.texts]
        check, name = _check(example), entry_point(example)
        executed = yield [
            Execute(program, check=check, entry_point=name, seconds=seconds) for program in programs
        ]
        return row(executed, programs)

    return Task(
        name="mbpp",
        version="1",
        licence="CC-BY-4.0",
        place=Place(
            *("specialised", "computer science", "code generation", "functions"), languages=("PL",)
        ),
        examples=tested,
        run=run,
        aggregate=lambda rows: pass_at(rows, k),
        fewshot=shown,
        shots=3,
    )


def _question(example: Example) -> str:
    text = example.get("prompt") or example.get("text")
    if not text:
        raise ValueError("has neither 'prompt' nor 'text'")
    tests = "\n".join(example["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _code(answer: str) -> str:
    answer = answer.partition(END)[0].removeprefix("[BEGIN]")
    code = fenced(answer)
    return answer if code is None else code


def _check(example: Example) -> str:
    """Each assertion on its own, so that its text may have any indentation."""
    setup = [*example.get("test_imports", ()), example.get("test_setup_code", "")]
    return "\n".join(
        [
            *setup,
            f"ASSERTIONS = {list(example['test_list'])!r}",
            "def check(candidate):",
            "    for assertion in ASSERTIONS:",
            "        exec(assertion, globals())",
        ]
    )


def entry_point(example: Example) -> str:
    """The function that the tests call, of those that the model solution defines."""
    if "entry_point" in example:
        return str(example["entry_point"])
    try:
        defined = [
            node.name
            for node in ast.parse(example["code"]).body
            if isinstance(node, ast.FunctionDef)
        ]
        tests = ast.parse("\n".join(example["test_list"]))
    except SyntaxError as error:
        raise ValueError(f"its code or tests are not Python: {error}") from None
    called = {
        node.func.id
        for node in ast.walk(tests)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    names = [name for name in defined if name in called]
    if len(names) != 1:
        raise ValueError(
            f"its tests call {names or 'none'} of the functions {defined}; it must be exactly one, "
            "or the field 'entry_point' must name it"
        )
    return names[0]
