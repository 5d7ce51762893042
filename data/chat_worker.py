"""The process that renders chat templates; `data/chat_process.py` starts it as a script.

A template comes with a model from anywhere, so it runs in Jinja's immutable sandbox, and the
process around it may open no file or connection, write nothing, start nothing, and holds little
memory. It reads and answers messages of 8 bytes of length and as much JSON, until its input ends.

    {"template": …, "variables": {…}, "spans": false} -> {"text": …, "spans": [[start, stop], …]}
                                                      or {"error": …, "line": number or null}
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import resource
import secrets
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY = 2**29
LENGTH_BYTES = 8
Message = Mapping[str, Any]


class Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: what the assistant wrote, marked when asked for."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.marks = ("", "")

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """A block whose text goes through `_marked`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        start, stop = self.marks
        return f"{start}{caller()}{stop}"


class Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def new_namespace(*args: Any, **kwargs: Any) -> Namespace:
    """What `namespace(…)` makes in a template."""
    made = Namespace()
    for name, value in dict(*args, **kwargs).items():
        made[name] = value
    return made


def new_dict(*args: Any, **kwargs: Any) -> dict:
    """What `dict(…)` makes in a template, which never holds the class itself."""
    return dict(*args, **kwargs)


def raise_exception(message: str) -> None:
    """A template's own error."""
    raise jinja2.exceptions.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's `tojson` without the escapes that HTML needs."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime_now(form: str) -> str:
    """The date and time of this moment in a template's own form."""
    return datetime.datetime.now().strftime(form)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it (the settings are those of transformers)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": new_dict,
        "namespace": new_namespace,
    }
    return environment


@functools.lru_cache(maxsize=64)
def compiled(environment: jinja2.Environment, template: str) -> jinja2.Template:
    """A template, compiled once."""
    return environment.from_string(template)


def render(environment: jinja2.Environment, request: Message) -> Message:
    """The answer to one request."""
    try:
        template = compiled(environment, request["template"])
        text = template.render(request["variables"])
        if not request["spans"]:
            return {"text": text, "spans": []}
        return {"text": text, "spans": _spans(environment, template, request["variables"], text)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "line": _line(error)}


def _spans(
    environment: Any, template: jinja2.Template, variables: Message, text: str
) -> list[tuple[int, int]]:
    """Where the generation blocks stand in the text, from a second rendering with marks."""
    generation = environment.extensions[Generation.identifier]
    secret = secrets.token_hex(8)
    generation.marks = (f"\ufdd0{secret}(", f"\ufdd0{secret})")
    try:
        parts = re.split(f"\ufdd0{secret}([()])", template.render(variables))
    finally:
        generation.marks = ("", "")
    if "".join(parts[::2]) != text:
        raise jinja2.exceptions.TemplateError("its text changes where generation blocks are marked")
    spans, opened, at = [], [], 0
    for part, mark in zip(parts[::2], [*parts[1::2], ""], strict=True):
        at += len(part)
        if mark == "(":
            opened.append(at)
        elif mark == ")":
            spans.append((opened.pop(), at))
    return spans


def _line(error: Exception) -> int | None:
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next(
        (frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), None
    )


def warm_up(environment: jinja2.Environment) -> None:
    """Have Python read the files that it reads on first use: codecs, word lists, the time zone."""
    filters = "{{ lipsum(n=1) }}{{ 'é'|urlencode }}{{ ['é']|pprint }}{{ 'a.b'|urlize }}"
    for template in (filters, "{{ strftime_now('%A %Z') }}", "{% include 'x' %}", "{{ '"):
        render(environment, {"template": template, "variables": {}, "spans": False})


def confine(memory: int = MEMORY) -> None:
    """Give up, for good, what a template has no use for: memory, files, connections, processes."""
    limits = {
        resource.RLIMIT_AS: memory + _held(),
        resource.RLIMIT_NOFILE: 3,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):
            # Some systems know no such limit; the sandbox and the deadline are still there.
            continue


def _held() -> int:
    """Bytes of address space that Python itself has taken; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def read(stream: BinaryIO) -> Message | None:
    """The next message, None at the end."""
    length = stream.read(LENGTH_BYTES)
    return json.loads(stream.read(int.from_bytes(length, "big"))) if length else None


def write(stream: BinaryIO, message: Message) -> None:
    """Send a message."""
    content = json.dumps(message).encode()
    stream.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
    stream.flush()


def main() -> None:
    """Say that the process is ready, then answer until the input ends."""
    environment = make_environment()
    warm_up(environment)
    confine()
    write(sys.stdout.buffer, {"ready": True})
    while (request := read(sys.stdin.buffer)) is not None:
        answer = render(environment, request)
        try:
            write(sys.stdout.buffer, answer)
        except MemoryError:
            write(sys.stdout.buffer, {"error": "MemoryError: the text is too long", "line": None})


if __name__ == "__main__":
    main()
