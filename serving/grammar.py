"""Guided decoding: which tokens keep an answer in the form that its request asks for.

The llguidance library turns a JSON schema, a regex or a Lark grammar into a parser over bytes and
finds the ids whose bytes may come next. Grammars are compiled in threads and kept; a `Matcher`
follows one answer through its grammar. The engine's thread asks for masks before it sends a step,
and tells what was sampled once it has read it.

    matcher = grammars.compile(StructuredOutputs(regex="[0-9]+")).matcher()
    masks = grammars.masks([matcher])       # what may come first
    matcher.accept(token)

No JAX here.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.checks import ParameterError
from serving.structured import StructuredOutputs

if TYPE_CHECKING:
    from data.tokenizers import Tokenizer

COMPILE_S = 5.0
"""A grammar that takes longer is refused."""
KEPT, WORKERS = 256, 2
STACK_BYTES = 256 << 20
"""The library descends into grammars by recursion, 64 KiB of one may be thousands deep."""
WHITESPACE = r" |\n\n?"
"""At most so much between the parts of JSON, once; without a bound small models write no end."""
LONGEST_REASON = 300
NO_TEXT = "NoExtension"
"""How the library says that no id may follow."""
_RIGHT = {
    "json": "a JSON schema that can be enforced",
    "json_object": "a JSON object",
    "regex": "a regular expression in Rust's syntax",
    "choice": "texts that the tokenizer can spell",
    "grammar": "a Lark grammar as llguidance reads it",
}
_HEADER = '\n%llguidance {"no_forcing": true}\n'
"""What is certain is sampled too, in whatever tokens the model prefers."""


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, compiled: Any) -> None:
        self._at = compiled.deep_copy()

    def accept(self, token: int) -> None:
        """Go on by a sampled id; one that the mask had not leads to a dead end."""
        self._at.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._at.is_stopped() and not self._at.is_error()

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return not self._at.is_error() and self._at.is_accepting()

    @property
    def failure(self) -> str | None:
        """Why the library gave up; None where it did not, or where no id can follow."""
        told = self._at.get_error()
        return None if not told or told.startswith(NO_TEXT) else reason(told)


class Compiling:
    """A grammar that is being compiled, or has been.

    done: its future; holds a compiled matcher or what is wrong. began: when a thread took it up.
    """

    def __init__(self, wanted: StructuredOutputs) -> None:
        self.wanted = wanted
        self.began: float | None = None
        self.done: Future[Any] = Future()

    def late(self, now: float) -> bool:
        """Whether it takes longer than grammars may."""
        return not self.done.done() and self.began is not None and now - self.began > COMPILE_S

    def matcher(self, param: str = "structured_outputs") -> Matcher:
        """A matcher at the beginning; waits for it. Raises `ParameterError` that names `param` and
        what of the grammar is wrong.
        """
        error = self.done.exception()
        if isinstance(error, ValueError):
            raise self.refusal(param, str(error)) from error
        if error is not None:
            raise RuntimeError(f"llguidance failed: {error}") from error
        return Matcher(self.done.result())

    def refusal(self, param: str, why: str | None = None) -> ParameterError:
        """The error of a grammar that cannot be used; None is that it takes too long."""
        kind = self.wanted.kind
        why = why or f"takes more than {COMPILE_S:g} s to compile"
        return ParameterError(param, f"has a {kind} that cannot be used: {why}", _RIGHT[kind])


class Grammars:
    """The grammars of one tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, end_ids: Collection[int]
    ) -> None:
        """vocab_size: width of the model's logits. end_ids: ids that end an answer where it is
        complete, and stand nowhere else.
        """
        self._tokenizer, self._vocab = tokenizer, vocab_size
        self._ends = sorted(i for i in end_ids if i < vocab_size)
        self._kept: OrderedDict[str, Compiling] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(WORKERS, "grammar")

    def check(self, wanted: StructuredOutputs) -> None:
        """Raise `ParameterError` if the checkpoint's tokenizer cannot be guided at all, and
        `ImportError` without llguidance.
        """
        _library()
        if self._bytes is None:
            have = "has none" if self._tokenizer is None else "does not say the bytes of its ids"
            right = f"left out: the checkpoint's tokenizer {have}"
            raise ParameterError(wanted.param, f"has a {wanted.kind}", right)

    def compile(self, wanted: StructuredOutputs) -> Compiling:
        """Begin to compile a grammar, or give what was begun before."""
        with self._lock:
            if (found := self._kept.get(wanted.key)) is not None:
                self._kept.move_to_end(wanted.key)
                return found
            compiling = self._kept[wanted.key] = Compiling(wanted)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            self._start(compiling)
        return compiling

    def masks(self, matchers: Sequence[Matcher | None]) -> np.ndarray:
        """`uint32[rows, ceil(vocab_size / 32)]`, a bit for each id that may come next: the lowest
        is id 0, all are set without a matcher, none is in a dead end.
        """
        words = np.full((len(matchers), -(-self._library_vocab // 32)), 0xFFFFFFFF, np.uint32)
        guided = [(each._at, row) for row, each in enumerate(matchers) if each is not None]
        fill = importlib.import_module("llguidance.numpy").fill_next_token_bitmask_par
        fill(self._executor, guided, words.view(np.int32))
        for at, row in guided:
            if at.is_error():  # The library allows an end there.
                words[row] = 0
        return words[:, : -(-self._vocab // 32)]

    def close(self) -> None:
        """Compile nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, compiling: Compiling) -> None:
        before = threading.stack_size(STACK_BYTES)
        try:
            self._pool.submit(self._work, compiling)  # Starts a thread, of that size.
        finally:
            threading.stack_size(before)

    def _work(self, compiling: Compiling) -> None:
        try:
            tokens = self._tokens
            compiling.began = time.monotonic()
            compiled = _library().LLMatcher(tokens, _source(compiling.wanted), log_level=0)
            if not compiled.is_error():
                compiled.compute_bitmask()  # Some grammars are too large only now.
            if compiled.is_error():
                raise ValueError(_with_place(reason(compiled.get_error()), compiling.wanted))
            compiling.done.set_result(compiled)
        except BaseException as error:  # Rust's panics are no `Exception`.
            compiling.done.set_exception(error)

    @property
    def _library_vocab(self) -> int:
        """Ids that the library knows: it needs an end, a model may have none."""
        return self._vocab + (not self._ends)

    @functools.cached_property
    def _bytes(self) -> list[bytes] | None:
        return None if self._tokenizer is None else self._tokenizer.id_bytes()

    @functools.cached_property
    def _executor(self) -> Any:
        return _library().LLExecutor()

    @functools.cached_property
    def _tokens(self) -> Any:
        """The vocabulary as the library reads it. Special tokens have names for Lark grammars."""
        assert self._tokenizer is not None
        assert self._bytes is not None
        ends = self._ends or [self._vocab]
        names = {i: name.encode() for name, i in self._tokenizer.special_tokens.items()}
        names = dict.fromkeys(ends, b"<|end|>") | {i: n for i, n in names.items() if n}
        names = {i: name for i, name in names.items() if i < self._library_vocab}
        tokens = [*self._bytes[: self._vocab], *[b""] * (self._library_vocab - len(self._bytes))]
        for i, name in names.items():
            tokens[i] = name
        told = SimpleNamespace(
            eos_token_id=ends[0],
            bos_token_id=None,
            tokens=tokens,
            special_token_ids=sorted(names),
            is_tokenizer_wrapper=True,
        )
        return _library().LLTokenizer(_Vocabulary(told), n_vocab=len(tokens), eos_token=ends)


class _Vocabulary:
    """What the library asks of a tokenizer; it encodes only where tokens are forced."""

    def __init__(self, told: SimpleNamespace) -> None:
        self.__dict__.update(vars(told))

    def __call__(self, text: str) -> list[int]:
        return []


def reason(told: str) -> str:
    """One line of what the library says, without its state and the source that it shows."""
    shown = re.split(r"\n<state>|\n +\d+ \| ", told)[0]
    lines = [line.strip() for line in shown.splitlines() if line.strip(" ^")]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    text = re.sub(r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?|^error: ", "", line)
    if text.startswith(NO_TEXT):
        return "no text is of this form"
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "..."


def _source(wanted: StructuredOutputs) -> str:
    """The grammar in the library's own notation."""
    if wanted.kind == "grammar":
        return wanted.text + _HEADER
    if wanted.kind in ("json", "json_object"):
        schema = json.loads(wanted.text) if wanted.kind == "json" else {"type": "object"}
        schema = {} if schema is True else schema
        own = schema.get("x-guidance", {})
        if isinstance(own, dict):
            schema = schema | {"x-guidance": {"whitespace_pattern": WHITESPACE} | own}
        return f"start: %json {json.dumps(schema)}" + _HEADER
    one = wanted.text
    if wanted.kind == "choice":
        one = "|".join(map(re.escape, wanted.choice))
    # \d and \w are ASCII's, as in JSON schemas: those of Unicode differ between libraries.
    return f"start: ANSWER\nANSWER: /{_library().regex_to_lark(one, 'dw')}/" + _HEADER


def _with_place(why: str, wanted: StructuredOutputs) -> str:
    """A reason with the path to the keyword of a schema that it names."""
    named = re.fullmatch(r'Unimplemented keys: \["(\w+)".*', why)
    if named is None or wanted.kind != "json":
        return why
    place = _find(json.loads(wanted.text), named[1])
    return why if place is None else f"{why}, at #/{'/'.join(place)}"


def _find(value: Any, key: str) -> list[str] | None:
    """The path to the first object in a JSON value that has such a key."""
    if isinstance(value, dict) and key in value:
        return [key]
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for name, each in inside:
        below = _find(each, key) if isinstance(each, dict | list) else None
        if below is not None:
            return [str(name), *below]
    return None


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ImportError(
            "guided decoding needs the llguidance library: pip install 'sheaf[serve]'"
        ) from error
