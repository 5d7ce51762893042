"""IQ suite, anti-interference: what matters stands among much that does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evals.extract import first_line
from evals.task import Context, Coroutine, Example, Task
from evals.tasks.exact_match import outcomes
from evals.tasks.iq import WORDS, generated, pick, random_text
from evals.taxonomy import Place

PEOPLE = ["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry"]
PLACES = ["kitchen", "garden", "hallway", "bedroom", "office", "bathroom", "cellar", "garage"]
OBJECTS = ["ball", "book", "lamp", "key", "cup"]


def key_retrieval(samples: int = 300, sentences: int = 20, seed: int = 0) -> Task:
    """Two keys with values among `sentences` sentences of random words; both must be found."""

    def examples() -> Sequence[Example]:
        return [_keys(np.random.default_rng((seed, i)), f"{seed}-{i}") for i in range(samples)]

    def _keys(rng: np.random.Generator, name: str) -> Example:
        keys, values = pick(rng, WORDS, 2), [random_text(rng), random_text(rng)]
        lines = [f"The {' '.join(pick(rng, WORDS, 5))}." for _ in range(sentences)]
        for key, value in zip(keys, values, strict=True):
            line = f"The value of {key} is {value}."
            lines.insert(int(rng.integers(len(lines) + 1)), line)
        return {"id": name, "text": "\n".join(lines), "keys": keys, "values": values}

    def run(example: Example, context: Context) -> Coroutine:
        questions = [
            f"{example['text']}\n\nQuestion: What is the value of {key}?\nThe value of {key} is"
            for key in example["keys"]
        ]
        options = {"max_tokens": 32, "until": ("\n",)}
        answers = yield [context.ask(question, **options) for question in questions]
        lines = [first_line(answer.texts[0]) for answer in answers]
        given = [line.split()[0].rstrip(".") if line else None for line in lines]
        right = given == list(example["values"])
        outcome = "unparsed" if None in given else "correct" if right else "incorrect"
        return {"gold": example["values"], "parsed": given, "outcome": outcome}

    place = Place("knowledge and capability", "reasoning", "anti-interference")
    return Task("iq_key_retrieval", "1", "generated", place, examples, run, outcomes)


def one_fact(samples: int = 300, moves: int = 8, people: int = 4, seed: int = 0) -> Task:
    """Where is a person, after `moves` moves of `people`? One sentence decides."""

    def story(rng: np.random.Generator) -> tuple[str, str]:
        lines, at = _walk(rng, moves, people)
        who = pick(rng, sorted(at), 1)[0]
        return f"{' '.join(lines)}\nQuestion: Where is {who}?\nAnswer:", at[who]

    return _facts("iq_one_fact", story, samples, seed)


def two_facts(samples: int = 300, moves: int = 8, people: int = 4, seed: int = 0) -> Task:
    """Where is an object that a person took, and then went on with? Two sentences decide."""

    def story(rng: np.random.Generator) -> tuple[str, str]:
        before, at = _walk(rng, moves // 2, people)
        who, what = pick(rng, sorted(at), 1)[0], pick(rng, OBJECTS, 1)[0]
        after, later = _walk(rng, moves - moves // 2, people, at)
        lines = [*before, f"{who} took the {what}.", *after]
        return f"{' '.join(lines)}\nQuestion: Where is the {what}?\nAnswer:", later[who]

    return _facts("iq_two_facts", story, samples, seed)


def _walk(
    rng: np.random.Generator, moves: int, people: int, start: dict[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Sentences, and where everybody is after them."""
    at, lines = dict(start or {}), []
    names = sorted(at) or pick(rng, PEOPLE, people)
    for _ in range(max(moves, 1)):
        who = names[rng.integers(len(names))]
        at[who] = pick(rng, [place for place in PLACES if place != at.get(who)], 1)[0]
        lines.append(f"{who} went to the {at[who]}.")
    return lines, at


def _facts(name: str, story, samples: int, seed: int) -> Task:
    """Two solved stories, then the one that is asked."""

    def make(rng: np.random.Generator) -> tuple[str, str]:
        solved = ["{} {}\n\n".format(*story(rng)) for _ in range(2)]
        prompt, answer = story(rng)
        return "".join(solved) + prompt, answer

    return generated(name, make, seed, samples, 16, "anti-interference")
