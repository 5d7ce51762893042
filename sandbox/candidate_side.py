"""The program of a candidate's sandbox: load the solution, then answer calls on descriptor 3.

Nothing here is a secret or a judge. The solution may overwrite all of it: what leaves this process
is frames of plain values, and the checker, which nothing here can reach, compares them.
"""

import sys

import wire

CHANNEL = 3


def load(name: str):
    """The module made of `solution.py`, which is not `__main__`."""
    module = type(sys)(name)
    sys.modules[name] = module
    with open("solution.py", encoding="utf-8", errors="surrogatepass") as file:
        source = file.read()
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    return module


def failure(error: BaseException) -> tuple:
    """`("raised", built-in names of its classes, message)`."""
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    try:
        message = str(error)[:1000]
    except BaseException:
        message = ""
    return ("raised", names, message)


def answer(function, call: tuple) -> tuple:
    """`("returned", bytes)`, or how it failed."""
    _, arguments, named = call
    try:
        result = function(*arguments, **named)
    except BaseException as error:
        return failure(error)
    try:
        return ("returned", wire.encode(result))
    except BaseException as error:
        return ("unsendable", [], str(error)[:1000])


def main() -> None:
    """Serve until the checker closes the channel."""
    entry_point = sys.argv[1]
    try:
        function = getattr(load("solution"), entry_point)
    except BaseException as error:
        wire.send(CHANNEL, failure(error))
        return
    wire.send(CHANNEL, ("ready", [], ""))
    while True:
        try:
            call = wire.receive(CHANNEL)
        except EOFError:
            return
        wire.send(CHANNEL, answer(function, call))


if __name__ == "__main__":
    main()
