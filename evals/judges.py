"""Judges: a model that reads answers and says which is better, how good, or what it keeps.

    preference = yield from Judge(context).pairwise(question, first, second)

A task asks them like anything else: requests to the role `judge`, which any model plays. Each is
asked greedily and its text parsed strictly; what cannot be read is asked again with other draws,
then counts as `unparsed`, never as a tie. Two answers are shown in both orders; a judge who goes by
the order has said nothing, which is a tie that is marked as flipped.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from evals.extract import LONGEST
from evals.metrics import cohen_kappa, confusion, f1
from evals.stats import bootstrap_table, mean, proportion
from evals.task import Context, Estimate, Generate, Generated

Winner = Literal["first", "second", "tie", "unparsed"]
WINNERS: tuple[Winner, ...] = ("first", "second", "tie")
ATTEMPTS, MOST_TOKENS, RETRY_TEMPERATURE = 4, 256, 0.7
"""One greedy answer and three drawn ones: a greedy judge would only repeat itself."""
CRITERION = "does what the task asks, correctly and completely"
PAIRWISE = (
    "Compare two responses to a task. Judge how well each does what the task asks; neither its "
    "place nor its length counts.\n\nTask:\n{question}\n\nResponse 1:\n{first}\n\nResponse 2:\n"
    "{second}\n\nSay in a few words why, then end with one line: Verdict: 1, Verdict: 2 or "
    "Verdict: Tie.\n"
)
POINTWISE = (
    "Grade a response to a task.\n\nTask:\n{question}\n\nResponse:\n{answer}\n\nCriterion: "
    "{criterion}\n\nSay in a few words why, then end with one line, Score: and a whole number from "
    "{low} (worst) to {high} (best).\n"
)
CHECKLIST = (
    "Check a response to a task against each requirement.\n\nTask:\n{question}\n\nResponse:\n"
    "{answer}\n\nRequirements:\n{listed}\n\nAnswer with one line for each requirement, in order: "
    "its number, a colon, and yes or no.\n"
)
T = TypeVar("T")
Asked = Generator[list[Generate], list[Generated], T]


@dataclass(frozen=True)
class Preference:
    """What a judge said of two answers.

    winner: what both orders agree on, else a tie; `unparsed` if one of them could not be read.
    shown: what each order said, as places of the answers on the page, not of the answers given.
    """

    winner: Winner
    shown: tuple[Winner, Winner]

    @property
    def flipped(self) -> bool:
        """Whether the verdict went by the place: for the first both times, or the second."""
        return self.shown[0] == self.shown[1] and self.shown[0] in ("first", "second")


@dataclass(frozen=True)
class Judge:
    """How the judge is asked about an example.

    context: the example's, whose seed draws second tries. chat: in messages, by the judge's chat
    template; else in plain prompts.
    """

    context: Context
    chat: bool = True

    def pairwise(
        self, question: str, first: str, second: str, prompt: str = PAIRWISE
    ) -> Asked[Preference]:
        """Which of two answers is better, asked in both orders.

        prompt: a template with `question`, `first` and `second`.
        """
        orders = ((first, second), (second, first))
        texts = [_filled(prompt, question=question, first=a, second=b) for a, b in orders]
        straight, turned = yield from self._ask(texts, verdict)
        return preference(straight or "unparsed", turned or "unparsed")

    def pointwise(
        self,
        question: str,
        answer: str,
        criterion: str = CRITERION,
        scale: tuple[int, int] = (1, 5),
        prompt: str = POINTWISE,
    ) -> Asked[int | None]:
        """A whole number on a scale, its ends included; None if the judge gave none."""
        low, high = scale
        given = {"question": question, "answer": answer, "criterion": criterion}
        text = _filled(prompt, **given, low=str(low), high=str(high))
        [found] = yield from self._ask([text], lambda said: score(said, low, high))
        return found

    def checklist(
        self, question: str, answer: str, requirements: Sequence[str], prompt: str = CHECKLIST
    ) -> Asked[tuple[bool, ...] | None]:
        """Whether an answer keeps each requirement; None if the judge left one out."""
        if not requirements:
            raise ValueError("a checklist needs at least one requirement")
        listed = "\n".join(f"{n}. {each}" for n, each in enumerate(requirements, start=1))
        text = _filled(prompt, question=question, answer=answer, listed=listed)
        [found] = yield from self._ask([text], lambda said: checks(said, len(requirements)))
        return found

    def _ask(self, prompts: Sequence[str], parse: Callable[[str], Any]) -> Asked[list[Any | None]]:
        """What each prompt's answer says; those that cannot be read are asked again together."""
        found: list[Any | None] = [None] * len(prompts)
        for attempt in range(ATTEMPTS):
            waiting = [place for place, value in enumerate(found) if value is None]
            if not waiting:
                break
            answers = yield [self._request(prompts[place], attempt) for place in waiting]
            for place, answer in zip(waiting, answers, strict=True):
                found[place] = parse(answer.texts[0])
        return found

    def _request(self, prompt: str, attempt: int) -> Generate:
        context = dataclasses.replace(self.context, chat=self.chat)
        drawn = {"temperature": RETRY_TEMPERATURE, "seed": context.sample_seed(1000 + attempt)}
        return context.ask(prompt, max_tokens=MOST_TOKENS, to="judge", **(drawn if attempt else {}))


def preference(straight: Winner, turned: Winner) -> Preference:
    """Of the verdicts on both orders, each as places on its page."""
    back: dict[Winner, Winner] = {"first": "second", "second": "first"}
    if "unparsed" in (straight, turned):
        return Preference("unparsed", (straight, turned))
    agreed = straight == back.get(turned, turned)
    return Preference(straight if agreed else "tie", (straight, turned))


def _filled(prompt: str, **values: str) -> str:
    """The template with its fields; braces in the values mean nothing."""
    return re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), prompt)


def verdict(text: str) -> Winner | None:
    """The last `Verdict: 1`, `2` or `Tie`, or the first line if it is just one of these."""
    text = text[-LONGEST:]
    places: dict[str, Winner] = {"1": "first", "2": "second", "tie": "tie"}
    found = re.findall(r"\bverdict\W{0,6}(1|2|tie)\b", text, flags=re.IGNORECASE)
    line = text.strip().partition("\n")[0].strip(" *.").lower()
    said = found[-1].lower() if found else line
    return places.get(said)


def score(text: str, low: int, high: int) -> int | None:
    """The last `Score: N`, or the text if it is just a number; None outside the scale."""
    text = text[-LONGEST:]
    found = re.findall(r"\bscore[\s:*=]{0,6}(-?\d{1,9})\b(?!\.\d)", text, flags=re.IGNORECASE)
    alone = re.fullmatch(r"\W{0,6}(-?\d{1,9})\W{0,6}", text.strip())
    given = found[-1] if found else alone[1] if alone else None
    return int(given) if given is not None and low <= int(given) <= high else None


def checks(text: str, count: int) -> tuple[bool, ...] | None:
    """One yes or no for each of the numbers 1 to `count`, the last of each; None if one lacks."""
    lines = re.findall(
        r"^\W{0,6}(\d{1,4})\s*[.:)]\W{0,6}(yes|no)\b", text[-LONGEST:], re.IGNORECASE | re.MULTILINE
    )
    said = {int(number): word.lower() == "yes" for number, word in lines}
    wanted = range(1, count + 1)
    return tuple(said[number] for number in wanted) if all(n in said for n in wanted) else None


def win_rate(winners: Sequence[Winner]) -> Estimate:
    """The share of pairs that the first answer wins; a tie is half, what was not read is lost."""
    worth = {"first": 1.0, "tie": 0.5}
    return mean([worth.get(each, 0.0) for each in winners])


def flip_rate(found: Sequence[Preference]) -> Estimate:
    """The share of read pairs whose verdict went by the place on the page."""
    return _share([float(each.flipped) for each in found if each.winner != "unparsed"])


def position_share(shown: Sequence[Winner]) -> Estimate:
    """Of verdicts for one of two places, the share for the first; a fair judge has a half."""
    return _share([float(each == "first") for each in shown if each in ("first", "second")])


def length_preference(lengths: Sequence[tuple[int, int]], winners: Sequence[Winner]) -> Estimate:
    """Of pairs of unequal lengths with a winner, the share that the longer one wins."""
    chosen = [
        float((first > second) == (winner == "first"))
        for (first, second), winner in zip(lengths, winners, strict=True)
        if winner in ("first", "second") and first != second
    ]
    return _share(chosen)


def agreement(gold: Sequence[Winner], given: Sequence[Winner]) -> dict[str, Estimate]:
    """How well verdicts match those of people: accuracy (what could not be read is wrong), Cohen's
    kappa and macro F1 of those that were read.
    """
    hits = [float(a == b) for a, b in zip(gold, given, strict=True)]
    read = [(a, b) for a, b in zip(gold, given, strict=True) if b in WINNERS]
    found = {"acc": proportion(hits)}
    if read:
        table = confusion([a for a, _ in read], [b for _, b in read], WINNERS)
        found |= {
            "kappa": bootstrap_table(cohen_kappa, table),
            "macro_f1": bootstrap_table(f1, table),
        }
    return found


def _share(values: Sequence[float]) -> Estimate:
    nothing = Estimate(math.nan, math.nan, math.nan, math.nan, 0, "nothing to count")
    return proportion(values) if values else nothing
