"""GSM8K: word problems of grade school, step by step (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evals.examples import read_examples
from evals.extract import number, outcome
from evals.task import Context, Coroutine, Example, Task
from evals.tasks.exact_match import outcomes
from evals.taxonomy import Place

STOPS = ("\n\nQuestion:", "\nQuestion:")


def gsm8k(path: str, shots: int = 5, max_tokens: int = 400) -> Task:
    """path: a folder with `test.jsonl` and `train.jsonl` (or `.gz`), from which shots are shown."""

    def rows(split: str) -> Sequence[Example]:
        folder = Path(path)
        file = folder / f"{split}.jsonl"
        return read_examples(
            file if file.is_file() else folder / f"{split}.jsonl.gz", ("question", "answer")
        )

    def run(example: Example, context: Context) -> Coroutine:
        shown = [f"{_question(each)} {each['answer']}\n\n" for each in context.fewshot]
        prompt = "".join(shown) + _question(example)
        [answer] = yield [context.ask(prompt, max_tokens=max_tokens, until=STOPS)]
        gold, given = number(str(example["answer"])), number(answer.texts[0])
        if gold is None:
            raise ValueError("its answer holds no number")
        result = outcome(given, gold)
        return {
            "gold": str(gold),
            "parsed": None if given is None else str(given),
            "outcome": result,
        }

    return Task(
        name="gsm8k",
        version="1",
        licence="MIT",
        place=Place(
            "knowledge and capability", "reasoning", "mathematical reasoning", "grade school"
        ),
        examples=lambda: rows("test"),
        run=run,
        aggregate=outcomes,
        fewshot=lambda: rows("train"),
        shots=shots,
    )


def _question(example: Example) -> str:
    return f"Question: {example['question']}\nAnswer:"
