"""The program of a checker's sandbox: run the trusted check against a candidate elsewhere.

Reads the nonce from standard input, makes calls on descriptor 3, and writes one report to
descriptor 4 that starts with the nonce. The candidate is in another process, in other namespaces:
it gets arguments and gives plain values, and has no way to this memory or these descriptors.

With `inline` the candidate's source runs right here, for results that cannot be sent. Then the
nonce stops what ends the process early, but code in one process can do what its neighbour can.
"""

import builtins
import posix
import sys

import wire

CHANNEL, REPORT = 3, 4


class CandidateLost(BaseException):
    """The candidate did not answer. No `Exception`, so that a check's own handlers let it by."""


class Candidate:
    """The function under test, as the check calls it."""

    def __init__(self, name: str):
        self.__name__ = name
        self.lost = ""

    def __call__(self, *arguments: object, **named: object) -> object:
        """The candidate's result, or the built-in exception it raised."""
        try:
            call = ("call", arguments, named)
            wire.encode(call)
        except TypeError as error:
            raise self.gone(f"an argument of the check cannot be sent: {error}") from None
        kind, names, value = self.ask(call)
        if kind == "returned":
            try:
                return wire.decode(value)
            except ValueError as error:
                raise self.gone(f"the candidate sent no value: {error}") from None
        raise self.error(kind, names, value)

    def ask(self, call: tuple | None = None) -> tuple:
        """Send a call; the three parts of the next frame."""
        try:
            if call is not None:
                wire.send(CHANNEL, call)
            frame = wire.receive(CHANNEL)
        except (EOFError, OSError):
            raise self.gone("the candidate ended before it answered") from None
        except ValueError as error:
            raise self.gone(f"the candidate sent no frame: {error}") from None
        if isinstance(frame, tuple) and len(frame) == 2 and frame[0] == "returned":
            return "returned", [], frame[1]
        if isinstance(frame, tuple) and len(frame) == 3 and isinstance(frame[1], list):
            return frame
        raise self.gone("the candidate sent another frame than an answer")

    def error(self, kind: object, names: list, message: object) -> BaseException:
        """The exception that stands for what went wrong over there."""
        if kind == "unsendable":
            return self.gone(f"a result cannot be sent: {message}")
        known = [getattr(builtins, name, None) for name in names if isinstance(name, str)]
        known = [each for each in known if isinstance(each, type) and issubclass(each, Exception)]
        if not known or kind != "raised":
            return self.gone(f"the candidate ended with {names[:1]}: {message}")
        try:
            return known[0](message)
        except TypeError:  # UnicodeError takes five arguments
            return ValueError(message)

    def gone(self, reason: str) -> CandidateLost:
        """A `CandidateLost`, remembered even if the check catches it."""
        self.lost = self.lost or reason
        return CandidateLost(reason)


def namespace(name: str) -> dict:
    """A fresh module's names."""
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


def source(name: str):
    """The code of a file beside this one."""
    with open(name, encoding="utf-8", errors="surrogatepass") as file:
        return compile(file.read(), name, "exec")


def where(error: BaseException) -> str:
    """` (check.py, line 3)`: the last place in the check that an error passed."""
    place, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "check.py":
            place = f" (check.py, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place


def examine(entry_point: str, inline: bool) -> str:
    """Why the candidate fails; empty if it passes."""
    candidate = None
    names = namespace("check")
    try:
        exec(source("check.py"), names)
        if inline:
            solution = namespace("solution")
            exec(source("solution.py"), solution)
            function = solution[entry_point]
        else:
            function = candidate = Candidate(entry_point)
            kind, classes, message = candidate.ask()
            if kind != "ready":
                return f"the solution does not load: {classes[:1]}: {message}"
        names[entry_point] = function
        names["check"](function)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"[:1000] + where(error)
        return (candidate.lost if candidate else "") or text
    return candidate.lost if candidate else ""


def main() -> None:
    """One report, whatever happens."""
    nonce = posix.read(0, 64)
    posix.close(0)
    reason = examine(sys.argv[1], sys.argv[2] == "inline")
    report = nonce + wire.encode(reason)
    posix.write(REPORT, report)


if __name__ == "__main__":
    main()
