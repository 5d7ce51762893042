"""Where a task stands among all that is evaluated: its `Place`, checked against the known names.

Groups and categories are those of Guo et al. 2023 (arXiv 2310.19736), ways of evaluating and kinds
of questions those of Liu et al. 2024 (arXiv 2402.18041).
"""

from __future__ import annotations

from dataclasses import dataclass

from weights import nearest

TREE: dict[str, tuple[str, ...]] = {
    "knowledge and capability": (
        "language modelling",
        "question answering",
        "knowledge completion",
        "reasoning",
        "tool learning",
        "negation",
    ),
    "alignment": ("ethics and morality", "bias", "toxicity", "truthfulness", "general"),
    "safety": ("robustness", "risk"),
    "specialised": (
        "biology and medicine",
        "education",
        "legislation",
        "computer science",
        "finance",
    ),
    "organisation": ("understanding and generation", "knowledge and reasoning", "holistic"),
}
"""Group -> categories."""
EVALUATIONS = {"CE": "by code", "ME": "by a model", "HE": "by people"}
QUESTIONS = {"SQ": "one right option", "OQ": "open", "Multi": "several right options"}


@dataclass(frozen=True)
class Place:
    """Where a task stands.

    group, category: of `TREE`. subcategory, domain: free words. languages: ISO 639-1 codes, PL for
    programming languages, none if it is about none. answer: of `QUESTIONS`. evaluation: of
    `EVALUATIONS`.
    """

    group: str
    category: str
    subcategory: str = ""
    domain: str = "general"
    languages: tuple[str, ...] = ("en",)
    modality: str = "text"
    answer: str = "OQ"
    evaluation: str = "CE"

    def __post_init__(self) -> None:
        _check("group", self.group, TREE)
        _check("category", self.category, TREE[self.group])
        _check("answer", self.answer, QUESTIONS)
        _check("evaluation", self.evaluation, EVALUATIONS)


def _check(field: str, value: str, known: dict[str, str] | dict[str, tuple] | tuple) -> None:
    if value not in known:
        near = nearest(value, known) or ", ".join(known)
        raise ValueError(f"Place.{field} is {value!r}; nearest: {near}")
