"""Generation from a file of `{"prompt", "answer"}`, compared as text.

`answer` may be a list of right ones. Compared are the first line, without the space around it, and
again with case, punctuation and articles left out.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from evals.examples import read_examples
from evals.extract import first_line
from evals.stats import proportion
from evals.task import Context, Coroutine, Estimate, Example, Row, Task
from evals.taxonomy import Place

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(path: str, max_tokens: int = 64, until: tuple[str, ...] = ("\n",)) -> Task:
    """Greedy answers of at most `max_tokens`, which end before any text of `until`."""

    def run(example: Example, context: Context) -> Coroutine:
        options = {"max_tokens": max_tokens, "until": () if context.chat else until}
        [answer] = yield [context.ask(str(example["prompt"]), **options)]
        given, gold = first_line(answer.texts[0]), example["answer"]
        golds = [str(each) for each in (gold if isinstance(gold, list) else [gold])]
        exact = given in [each.strip() for each in golds]
        loose = given is not None and normalised(given) in [normalised(each) for each in golds]
        outcome = "unparsed" if given is None else ("correct" if exact else "incorrect")
        return {"gold": golds, "parsed": given, "outcome": outcome, "loose": loose}

    return Task(
        name="exact_match",
        version="1",
        licence="of the file",
        place=Place("knowledge and capability", "question answering"),
        examples=lambda: read_examples(path, ("prompt", "answer")),
        run=run,
        aggregate=aggregate,
    )


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and repeated space (as SQuAD's scorer)."""
    bare = re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(bare.split())


def aggregate(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Shares of exact and of normalised matches."""
    return {**outcomes(rows), "loose": proportion([float(row["loose"]) for row in rows])}


def outcomes(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The share of rows whose outcome is `correct`."""
    return {"exact_match": proportion([float(row["outcome"] == "correct") for row in rows])}
