"""The form that an answer must have, as a request says it: `StructuredOutputs`, checked.

What is checked here needs no model; `serving/grammar.py` compiles it, and names what it cannot.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from serving.checks import ParameterError, strings

MOST_BYTES = 64 * 1024
FORMS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True)
class StructuredOutputs:
    """The form of an answer: exactly one of the first five.

    json: a JSON schema, an object or its text; kept as text, with its keys in their order, which is
        the order in which they are written. True allows any value.
    json_object: any JSON object.
    regex: what the whole answer matches; no look-around and no back-references.
    choice: texts, one of which is the answer.
    grammar: a grammar in Lark's notation, as llguidance reads it.
    param: the field of a request that an error names.

    Raises `ParameterError`, also for more than 64 KiB.
    """

    json: Any = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] = ()
    grammar: str | None = None
    param: str = dataclasses.field(default="structured_outputs", compare=False)

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            named = " and ".join(given) or "nothing"
            raise ParameterError(self.param, f"gives {named}", f"exactly one of {', '.join(FORMS)}")
        if self.kind == "json":
            object.__setattr__(self, "json", self._schema(self.json))
        elif self.kind == "choice":
            object.__setattr__(self, "choice", strings(f"{self.param}.choice", self.choice))
        elif self.kind == "json_object" and self.json_object is not True:
            self._refuse("is not true", "true, or left out")
        elif self.kind in ("regex", "grammar") and not isinstance(self.text, str):
            self._refuse("is no text", "a text")
        self._check_size()

    @classmethod
    def of(cls, given: Any, param: str = "structured_outputs") -> StructuredOutputs | None:
        """What the field of a request holds: None, one of these, or an object with their names."""
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            right = f"an object with one of {', '.join(FORMS)}"
            raise ParameterError(param, f"is a {type(given).__name__}", right)
        if unknown := [str(name) for name in given if name not in FORMS]:
            named = ", ".join(unknown)[:80]
            raise ParameterError(param, f"has {named}", f"exactly one of {', '.join(FORMS)}")
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(**chosen, param=param)

    @property
    def kind(self) -> str:
        """Which of the forms it is."""
        return self._given()[0]

    @property
    def text(self) -> str:
        """All that it says, as a text."""
        if self.kind == "choice":
            return json.dumps(self.choice, ensure_ascii=False)
        return "" if self.kind == "json_object" else getattr(self, self.kind)

    @property
    def key(self) -> str:
        """A hash: the same for what compiles to the same."""
        return hashlib.sha256(f"{self.kind}\0{self.text}".encode()).hexdigest()

    def _given(self) -> list[str]:
        return [name for name in FORMS if getattr(self, name) not in (None, False, (), [])]

    def _schema(self, given: Any) -> str:
        try:
            if isinstance(given, str):
                given = json.loads(given)
            text = json.dumps(given, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            self._refuse(f"is not JSON ({error})", "a JSON schema, an object or its text")
        if given is False or not isinstance(given, Mapping | bool):
            self._refuse(f"is {text[:80]}", "a JSON schema that allows something, an object")
        return text

    def _check_size(self) -> None:
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as error:
            self._refuse(f"is not Unicode ({error})", "Unicode without lone surrogates")
        if size > MOST_BYTES:
            self._refuse(f"has {size} bytes", f"at most {MOST_BYTES} bytes")

    def _refuse(self, what: str, right: str) -> NoReturn:
        raise ParameterError(self.param, f"has a {self.kind} that {what}", right)
