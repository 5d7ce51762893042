"""Rules: a regex over an array's path gives it logical axes, and all else that depends on its name.

Rules know the model's names and nothing of devices; `sharding.layout` maps logical axes to mesh
axes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from weights import nearest

Axes = tuple[str | None, ...]

STACKED = re.compile(r"(?:.*/)?layers/\d+-\d+/.+")
"""Paths of arrays that hold one segment of layers, stacked on a leading axis."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds for each array whose whole path matches a regex; the first matching rule counts.

    pattern: regex for the whole path, e.g. `layers/.*/query/kernel`.
    axes: logical axes of ONE layer's array, `("d_model", "heads")`; stacks get "layers" in front.
    init: name of the initial distribution (the model's table of them).
    scale: multiplies the standard deviation, or is the value, of that distribution.
    learning_rate: multiplies the learning rate of the array.
    weight_decay: multiplies the weight decay of the array.
    """

    pattern: str
    axes: Axes
    init: str = "normal"
    scale: float = 1.0
    learning_rate: float = 1.0
    weight_decay: float = 1.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"rule {self.pattern!r} is not a regular expression: {error}"
            ) from None

    def matches(self, path: str) -> bool:
        """True if the pattern describes the whole path."""
        return re.fullmatch(self.pattern, path) is not None

    def axes_at(self, path: str) -> Axes:
        """Logical axes of the array at `path`, with "layers" in front for stacked layers."""
        return ("layers", *self.axes) if STACKED.fullmatch(path) else self.axes


def match_rules(rules: Sequence[Rule], paths: Iterable[str]) -> dict[str, Rule]:
    """`{path: rule}`, the first rule that matches each path.

    Raises `ValueError` naming the paths that no rule matches, or the rules that match nothing.
    """
    paths = list(paths)
    found = {path: next((rule for rule in rules if rule.matches(path)), None) for path in paths}
    orphans = [path for path, rule in found.items() if rule is None]
    if orphans:
        raise ValueError(_no_rule(orphans, rules))
    matched = {path: rule for path, rule in found.items() if rule is not None}
    used = {id(rule) for rule in matched.values()}
    idle = [rule for rule in rules if id(rule) not in used]
    if idle:
        raise ValueError("\n".join(_matches_nothing(rule, matched, matched) for rule in idle))
    return matched


def override_axes(
    rules: Sequence[Rule], changes: Iterable[tuple[str, Axes]], paths: Iterable[str]
) -> tuple[Rule, ...]:
    """The rules with other logical axes where a `(pattern, axes)` change matches, all else kept.

    The first change that matches a path counts. Raises `ValueError` for one that matches none.
    """
    matched, changes = match_rules(rules, paths), tuple(changes)
    new = {}
    for pattern, axes in changes:
        wanted = Rule(pattern, axes)
        found = [path for path in matched if wanted.matches(path)]
        if not found:
            raise ValueError(_matches_nothing(wanted, {}, matched))
        for path in found:
            exact = dataclasses.replace(matched[path], pattern=re.escape(path), axes=axes)
            new.setdefault(path, exact)
    kept = {matched[path].pattern for path in matched if path not in new}
    return (*new.values(), *(rule for rule in rules if rule.pattern in kept))


def prefixed(rules: Sequence[Rule], prefix: str) -> tuple[Rule, ...]:
    """The rules of a model whose params stand below `prefix` in a larger tree."""
    return tuple(
        dataclasses.replace(rule, pattern=f"{re.escape(prefix)}/(?:{rule.pattern})")
        for rule in rules
    )


def rules_table(rules: Sequence[Rule]) -> str:
    """The rules as Python text that can be edited and pasted into a model or a config."""
    lines = [f"    Rule(r{rule.pattern!r}, {rule.axes!r}{_differences(rule)})," for rule in rules]
    return "\n".join(["RULES = (", *(line.replace("\\\\", "\\") for line in lines), ")"])


def _differences(rule: Rule) -> str:
    return "".join(
        f", {field.name}={getattr(rule, field.name)!r}"
        for field in dataclasses.fields(Rule)[2:]
        if getattr(rule, field.name) != field.default
    )


def _no_rule(orphans: Sequence[str], rules: Sequence[Rule]) -> str:
    patterns = [rule.pattern for rule in rules]
    shown = "\n".join(
        f"  {path} (nearest patterns: {nearest(path, patterns) or 'none'})" for path in orphans[:5]
    )
    more = f"\n  and {len(orphans) - 5} more" if len(orphans) > 5 else ""
    return f"no sharding rule matches these arrays; add a rule for them:\n{shown}{more}"


def _matches_nothing(rule: Rule, matched: Mapping[str, Rule], paths: Iterable[str]) -> str:
    hidden = [path for path in matched if rule.matches(path)]
    if hidden:
        return (
            f"sharding rule {rule.pattern!r} never applies: {hidden[0]} and all else it matches "
            f"is taken by an earlier rule ({matched[hidden[0]].pattern!r}); move it up or remove it"
        )
    close = nearest(rule.pattern, paths) or "none"
    return f"sharding rule {rule.pattern!r} matches no array; nearest paths: {close}"
