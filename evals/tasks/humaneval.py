"""HumanEval: 164 Python functions from their docstrings, judged by tests (Chen et al. 2021, arXiv
2107.03374). Programs run in the sandbox, apart from the tests, so that none can pass by cheating.
"""

from __future__ import annotations

from collections.abc import Sequence

from evals.examples import read_examples
from evals.task import Context, Coroutine, Example, Execute, Task
from evals.tasks.code import STOPS, ask, identified, pass_at, row, whole_program
from evals.taxonomy import Place

FIELDS = ("task_id", "prompt", "entry_point", "test")
INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block."


def humaneval(
    path: str,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 0.95,
    max_tokens: int = 512,
    k: tuple[int, ...] = (1, 10, 100),
    seconds: float = 3.0,
) -> Task:
    """path: `HumanEval.jsonl.gz`, or rows of the same fields.

    samples: programs for each problem; with more than one the temperature must be above 0 (0.2 is
    usual for pass@1, 0.8 for pass@100). seconds: of CPU time for a program.
    """
    if samples > 1 and temperature <= 0:
        raise ValueError(f"humaneval: {samples} samples at temperature 0 are equal; set it above 0")

    def run(example: Example, context: Context) -> Coroutine:
        prompt, name = str(example["prompt"]), str(example["entry_point"])
        question = f"{INSTRUCTION}\n\n```python\n{prompt}```" if context.chat else prompt
        options = {"temperature": temperature, "top_p": top_p if temperature else 1.0}
        stops = () if context.chat else STOPS
        [answer] = yield [
            ask(context, question, samples, max_tokens=max_tokens, until=stops, **options)
        ]
        programs = [whole_program(prompt, text, name, context.chat) for text in answer.texts]
        check = f"{prompt}\n{example['test']}"
        executed = yield [
            Execute(program, check=check, entry_point=name, seconds=seconds) for program in programs
        ]
        return row(executed, programs)

    def examples() -> Sequence[Example]:
        return identified(read_examples(path, FIELDS))

    return Task(
        name="humaneval",
        version="1",
        licence="MIT",
        place=Place(
            *("specialised", "computer science", "code generation", "functions"), languages=("PL",)
        ),
        examples=examples,
        run=run,
        aggregate=lambda rows: pass_at(rows, k),
    )
