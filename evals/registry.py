"""The tasks that come with Sheaf, by name, and how they are built from names and settings.

A task is a function of its settings: keyword arguments with defaults, from strings or values.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evals.task import Task
from evals.tasks.classification import polarity, trec
from evals.tasks.cloze import cloze
from evals.tasks.exact_match import exact_match
from evals.tasks.gsm8k import gsm8k
from evals.tasks.humaneval import humaneval
from evals.tasks.iq_patterns import full_repeat, head_slicing, head_tail
from evals.tasks.iq_retrieval import key_retrieval, one_fact, two_facts
from evals.tasks.iq_rules import counting, string_replacement
from evals.tasks.iq_symbols import symbol_polarity, symbol_trec
from evals.tasks.judged import judged
from evals.tasks.mbpp import mbpp
from evals.tasks.memorisation import memorisation
from evals.tasks.multiple_choice import multiple_choice
from evals.tasks.needle import needle
from evals.tasks.perplexity import perplexity
from evals.taxonomy import TREE, Place
from weights import nearest

TASKS: dict[str, Callable[..., Task]] = {
    "classification_polarity": polarity,
    "classification_trec": trec,
    "cloze": cloze,
    "exact_match": exact_match,
    "gsm8k": gsm8k,
    "humaneval": humaneval,
    "iq_counting": counting,
    "iq_full_repeat": full_repeat,
    "iq_head_slicing": head_slicing,
    "iq_head_tail": head_tail,
    "iq_key_retrieval": key_retrieval,
    "iq_one_fact": one_fact,
    "iq_string_replacement": string_replacement,
    "iq_symbol_polarity": symbol_polarity,
    "iq_symbol_trec": symbol_trec,
    "iq_two_facts": two_facts,
    "judged": judged,
    "mbpp": mbpp,
    "memorisation": memorisation,
    "multiple_choice": multiple_choice,
    "needle": needle,
    "perplexity": perplexity,
}
"""Name -> builder; its keyword arguments are the task's settings."""


def build(
    tasks: Sequence[str | Task], settings: Mapping[str, Any] | None = None, seed: int = 0
) -> list[Task]:
    """Tasks of names, `NAME` or `NAME@LABEL`, with settings `{"NAME.setting": value}`.

    seed: of tasks that generate their examples, unless a setting says otherwise. Raises
    `ValueError` for a name or setting that is not there, a value of the wrong type, or a setting
    that is missing.
    """
    settings = dict(settings or {})
    built = [each if isinstance(each, Task) else _one(each, settings, seed) for each in tasks]
    if settings:
        key = next(iter(settings))
        names = [each for each in tasks if isinstance(each, str)]
        raise ValueError(
            f"setting {key!r} belongs to no task; it must be NAME.setting with one of the names "
            f"{', '.join(names) or 'asked for'}"
        )
    return built


def _one(label: str, settings: dict[str, Any], seed: int) -> Task:
    name = label.partition("@")[0]
    if name not in TASKS:
        near = nearest(name, TASKS) or ", ".join(TASKS)
        raise ValueError(f"there is no task {name!r}; nearest: {near}")
    known = options(name)
    given: dict[str, Any] = {"seed": seed} if "seed" in known else {}
    for key in [key for key in settings if key.startswith(f"{label}.")]:
        setting = key[len(label) + 1 :]
        if setting not in known:
            near = nearest(setting, known) or ", ".join(known)
            raise ValueError(f"task {name} has no setting {setting!r}; nearest: {near}")
        given[setting] = _typed(key, known[setting], settings.pop(key))
    missing = [n for n, p in inspect.signature(TASKS[name]).parameters.items() if _needed(p)]
    for setting in missing:
        if setting not in given:
            raise ValueError(f"task {name} needs --{label}.{setting}=…")
    task = TASKS[name](**given)
    return replace(task, name=label, settings={**task.settings, **given})


def place_of(name: str) -> Place:
    """Where a named task stands; nothing is read for that."""
    needed = [n for n, p in inspect.signature(TASKS[name]).parameters.items() if _needed(p)]
    return TASKS[name](**dict.fromkeys(needed, ".")).place


def chosen(where: Mapping[str, str]) -> list[str]:
    """Names of the tasks whose `Place` has these values, or has them in it: `{"languages": "PL"}`.

    Raises `ValueError` for a field that a `Place` does not have.
    """
    fields = [each.name for each in dataclasses.fields(Place)]
    for field in where:
        if field not in fields:
            near = nearest(field, fields) or ", ".join(fields)
            raise ValueError(f"a task's place has no {field!r}; nearest: {near}")
    return [
        name
        for name in TASKS
        if all(_has(getattr(place_of(name), field), value) for field, value in where.items())
    ]


def _has(found: str | tuple[str, ...], value: str) -> bool:
    return value == found if isinstance(found, str) else value in found


def coverage(names: Sequence[str]) -> str:
    """How many of the tasks stand at each place of the taxonomy, as Markdown."""
    places = [place_of(name) for name in names]
    lines = ["| group | category | tasks |", "|---|---|---:|"]
    for group, categories in TREE.items():
        for category in categories:
            count = sum((p.group, p.category) == (group, category) for p in places)
            lines.append(f"| {group} | {category} | {count or '-'} |")
    return "\n".join(lines)


def _needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def options(name: str) -> dict[str, Any]:
    """The settings of a task, `{name: type}`."""
    hints = typing.get_type_hints(TASKS[name])
    return {key: hints[key] for key in inspect.signature(TASKS[name]).parameters}


def _typed(key: str, hint: Any, value: Any) -> Any:
    """A value as its setting has it; strings of a command line are read."""
    optional = isinstance(hint, types.UnionType)
    kinds = (
        [each for each in typing.get_args(hint) if each is not type(None)] if optional else [hint]
    )
    kind = kinds[0]
    if optional and value in (None, "None"):
        return None
    try:
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(inner(part) for part in parts)
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if typing.get_origin(kind) is typing.Literal:
            if value not in typing.get_args(kind):
                raise ValueError(value)
            return value
        return kind(value)
    except (ValueError, KeyError, TypeError):
        allowed = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else kind
        name = getattr(allowed, "__name__", allowed)
        raise ValueError(f"setting {key} is {value!r}; it must be of {name}") from None
