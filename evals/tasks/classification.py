"""Classification of texts by the likelihood of label words: TREC's question types (Li and Roth
2002) and the sentence polarity of film reviews (Pang and Lee 2005, what SST was made of).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.examples import read_text
from evals.metrics import confusion, f1
from evals.stats import bootstrap_table
from evals.task import Context, Coroutine, Estimate, Example, Row, Task
from evals.tasks.options import accuracies, picks, requests
from evals.taxonomy import Place

TREC = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}
POLARITY = {"negative": "bad", "positive": "good"}


@dataclass(frozen=True)
class Labels:
    """How a classification is asked.

    words: class -> the word that stands for it. instruction: before all. text, label: what stands
    before a text, and before its label.
    """

    words: Mapping[str, str]
    instruction: str
    text: str
    label: str


def classify(
    name: str,
    labels: Callable[[], Labels],
    examples: Callable[[], Sequence[Example]],
    fewshot: Callable[[], Sequence[Example]],
    shots: int,
    place: Place,
    licence: str,
    score: str = "acc",
) -> Task:
    """A task over `{"id", "text", "class"}`; scores as of multiple choice, and the macro F1 of
    `score`. labels: asked for when the task runs.
    """

    def show(example: Example, of: Labels) -> str:
        return f"{of.text} {example['text']}\n{of.label}"

    def run(example: Example, context: Context) -> Coroutine:
        of = labels()
        classes = list(of.words)
        shown = "".join(f"{show(e, of)} {of.words[e['class']]}\n\n" for e in context.fewshot)
        texts = [f" {of.words[each]}" for each in classes]
        prompt = f"{of.instruction}\n\n{shown}{show(example, of)}"
        answers = yield requests(prompt, texts, calibrated=True)
        gold, found = classes.index(example["class"]), picks(texts, answers)
        outcome = "correct" if found[score] == gold else "incorrect"
        return {"gold": gold, "picks": found, "outcome": outcome, "chance": 1 / len(classes)}

    def aggregate(rows: Sequence[Row]) -> dict[str, Estimate]:
        golds, given = [r["gold"] for r in rows], [r["picks"][score] for r in rows]
        table = confusion(golds, given, range(len(labels().words)))
        return {**accuracies(rows), "macro_f1": bootstrap_table(f1, table)}

    return Task(name, "1", licence, place, examples, run, aggregate, fewshot, shots)


TREC_LABELS = Labels(
    TREC,
    "Say what kind of thing each question asks for: abbreviation, description, entity, person, "
    "place or number.",
    "Question:",
    "Kind:",
)
TREC_PLACE = Place("knowledge and capability", "question answering", "question types", answer="SQ")
POLARITY_LABELS = Labels(
    POLARITY, "Say whether each film review is good or bad.", "Review:", "Verdict:"
)
POLARITY_PLACE = Place("knowledge and capability", "reasoning", "sentiment", "film", answer="SQ")
LICENCE = "research use"


def trec(path: str, shots: int = 0) -> Task:
    """path: a folder with `test.txt` and `train.txt`, lines `CLASS:subclass question`."""
    asked, shown = (functools.partial(trec_rows, path, split) for split in ("test", "train"))
    name = "classification_trec"
    return classify(name, lambda: TREC_LABELS, asked, shown, shots, TREC_PLACE, LICENCE)


def trec_rows(path: str, split: str) -> list[Example]:
    """The examples of a split."""
    file, rows = Path(path) / f"{split}.txt", []
    for number, line in enumerate(read_text(file, "latin-1").splitlines(), start=1):
        head, _, text = line.partition(" ")
        label = head.partition(":")[0]
        if label not in TREC or not text:
            raise ValueError(f"{file}: line {number} is {line[:40]!r}; must be CLASS:subclass text")
        rows.append({"id": f"{split}-{number}", "text": text.strip(), "class": label})
    return rows


def polarity(path: str, shots: int = 0) -> Task:
    """path: a folder with `negative.txt` and `positive.txt` (or `.gz`), a snippet a line. The first
    tenth of each is for few-shot examples, the rest is asked.
    """
    asked, shown = (functools.partial(polarity_rows, path, shown) for shown in (False, True))
    name = "classification_polarity"
    return classify(name, lambda: POLARITY_LABELS, asked, shown, shots, POLARITY_PLACE, LICENCE)


def polarity_rows(path: str, shown: bool) -> list[Example]:
    """The examples that are asked, or those that may be shown; classes take turns."""
    by_class = []
    for label in POLARITY:
        file = Path(path) / f"{label}.txt"
        text = read_text(file if file.is_file() else file.with_name(f"{file.name}.gz"))
        rows = [
            {"id": f"{label}-{number}", "text": line.strip(), "class": label}
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
        tenth = len(rows) // 10
        by_class.append(rows[:tenth] if shown else rows[tenth:])
    # One of each in turn, so that a limit keeps the classes even.
    return [row for pair in zip(*by_class, strict=False) for row in pair]
