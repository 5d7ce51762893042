"""A function passes its tests by being right, and in no other way."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sandbox_escapes import pool_or_skip

from sandbox import (
    TEST_LIMITS,
    FunctionTest,
    Pool,
    check,
    check_all,
    counts,
    wire,
)

HUMANEVAL = Path(__file__).parent.parent.parent / "shared" / "data" / "evals" / "HumanEval.jsonl.gz"
CHECK = """
def check(candidate):
    assert candidate(1, 2) == 3, "one and two"
    assert add(b=[5], a=[4]) == [4, 5]
    assert candidate("", "") == ""
"""
ALWAYS_EQUAL = """
class Equal:
    def __eq__(self, other): return True
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __len__(self): return 1
    def __iter__(self): return iter(())
    def __sub__(self, other): return self
    def __abs__(self): return 0
"""
LIMITS = replace(TEST_LIMITS, wall_seconds=30.0)


@pytest.fixture(scope="module")
def pool():
    with pool_or_skip(workers=2) as started:
        yield started


def verdict(pool: Pool, program: str, tests: str = CHECK, entry_point: str = "add", **options):
    return check(pool, FunctionTest(program, entry_point, tests, **options), LIMITS)


PLAIN = "def add(a, b):\n    return a + b\n"
RIGHT = {
    "plain": PLAIN,
    "recursive, with a helper": "def more(a, b): return a + b\ndef add(a, b): return more(a, b)",
    "talkative": f"print('hello')\n{PLAIN}",
    "with a dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\n"
    + PLAIN,
    "subclass of a list": "class L(list):\n  pass\ndef add(a, b):\n"
    "  return L(a) + b if isinstance(a, list) else a + b\n",
    "a thread that stays": "import threading, time\n"
    f"threading.Thread(target=time.sleep, args=(60,)).start()\n{PLAIN}",
}
CHEATS = {
    "nothing": ("def add(a, b): pass", "one and two"),
    "wrong": ("def add(a, b): return 3", "check.py, line 4"),
    "sys.exit": ("import sys\ndef add(a, b): sys.exit(0)", "SystemExit"),
    "os._exit": ("import os\ndef add(a, b): os._exit(0)", "ended before it answered"),
    "exit while loading": ("import os\nos._exit(0)", "ended before it answered"),
    "SystemExit while loading": ("raise SystemExit(0)", "does not load"),
    "KeyboardInterrupt": ("def add(a, b): raise KeyboardInterrupt", "KeyboardInterrupt"),
    "not there": ("def ad(a, b): return a + b", "AttributeError"),
    "not Python": ("def add(a, b) return", "SyntaxError"),
    "always equal": (f"{ALWAYS_EQUAL}\ndef add(a, b): return Equal()", "cannot be sent"),
    "an integer always equal": (
        "class E(int):\n  def __eq__(s, o): return True\n  __hash__ = int.__hash__\n"
        "def add(a, b): return E(7)",
        "one and two",
    ),
    "a list always equal": (
        "class E(list):\n  def __eq__(s, o): return True\ndef add(a, b): return E([7])",
        "one and two",
    ),
    "rewrites built-ins": (
        "import builtins\nbuiltins.AssertionError = type(None)\nbuiltins.len = lambda x: 1\n"
        "builtins.isinstance = lambda *a: True\ndef add(a, b): return None",
        "",
    ),
    "prints markers": ("def add(a, b): print('passed', 'True', 'OK')", "one and two"),
    "answers before it is asked": (
        "import wire\nfor _ in range(9): wire.send(3, ('returned', wire.encode(True)))\n"
        "def add(a, b): return 3",
        "does not load",
    ),
    "writes a report": (
        "import os, wire\nos.set_inheritable(3, True)\nfor fd in (3, 4, 5):\n  try:\n"
        "    os.write(fd, b'0' * 32 + wire.encode(''))\n  except OSError: pass\n"
        "def add(a, b): return 4",
        "",
    ),
    "closes the channel": ("import os\ndef add(a, b): os.close(3)", ""),
    "goes at exit": (
        "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): 0",
        "one and",
    ),
    "answers from a thread": (
        "import threading, wire\n"
        "def flood():\n  while True: wire.send(3, ('returned', wire.encode(3)))\n"
        "threading.Thread(target=flood, daemon=True).start()\ndef add(a, b): return 3",
        "",
    ),
    "replaces the encoder": (
        "import wire\nwire.encode = lambda value: b'l99999999999:'\ndef add(a, b): return 3",
        "",
    ),
    "sends a bottomless value": (
        "import os, wire\ndef add(a, b):\n"
        "  data = b'l1:' * 100_000\n"
        "  frame = b't2:s8:returnedb%d:' % len(data) + data\n"
        "  os.write(3, len(frame).to_bytes(8, 'big') + frame)",
        "sent no value",
    ),
    "announces a huge frame": ("import os\ndef add(a, b): os.write(3, b'\\x7f' * 8)", "no frame"),
    "looks for the check": (
        "import os, sys\n"
        "assert os.read(0, 64) == b''\n"
        "assert sorted(os.listdir()) == ['main.py', 'solution.py', 'wire.py']\n"
        "raise LookupError('nothing here')",
        "nothing here",
    ),
    "prints without end": ("def add(a, b):\n  while True: print('x' * 999)", "output"),
    "right, after ten megabytes": (f"print('x' * 10_000_000)\n{PLAIN}", "output"),
    "returns a lambda": ("def add(a, b): return lambda: 3", "a function cannot be sent"),
    "returns no end": (
        "import itertools\ndef add(a, b): return itertools.count()",
        "an iterator of more than",
    ),
}


def test_right_functions_pass(pool):
    for name, program in RIGHT.items():
        result = verdict(pool, program)
        assert result.passed, (name, result)
        assert (result.status, result.reason, result.cheatable) == ("passed", "", False)


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(pool, name):
    program, reason = CHEATS[name]
    result = verdict(pool, program)
    assert not result.passed
    assert reason in result.reason
    assert result.reason


def test_a_function_that_never_ends_or_takes_all_memory_is_told_so(pool):
    limits = replace(LIMITS, cpu_seconds=1)
    endless = FunctionTest("def add(a, b):\n  while True: pass", "add", CHECK)
    assert check(pool, endless, limits).status == "timeout"
    hungry = FunctionTest("def add(a, b): return 'x' * (1 << 31)", "add", CHECK)
    assert check(pool, hungry, limits).reason.startswith("MemoryError")


def test_values_and_exceptions_arrive_as_they_were(pool):
    values = (
        "[None, True, 2**200, -0.0, float('inf'), 1j, 'é\\ud800', b'\\0', (), {1: {2}},"
        " frozenset('a'), range(3), bytearray(b'x')]"
    )
    tests = f"""
def check(candidate):
    expected = {values}
    got = candidate("value")
    assert got == expected and [type(x) for x in got] == [type(x) for x in expected]
    assert list(candidate("iterator")) == [0, 1, 4]
    assert candidate("nan") != candidate("nan")
    for kind in (ValueError, KeyError, ZeroDivisionError, RecursionError, AssertionError):
        try:
            candidate(kind.__name__)
        except kind as error:
            assert "told" in str(error)
        else:
            assert False, kind
"""
    program = f"""
class Own(ValueError): pass
def f(what):
    if what == "value": return {values}
    if what == "iterator": return (x * x for x in range(3))
    if what == "nan": return float("nan")
    if what == "ValueError": raise Own("told")
    raise getattr(__builtins__, what, None)("told") if not isinstance(__builtins__, dict) \\
        else __builtins__[what]("told")
"""
    assert verdict(pool, program, tests, "f").reason == ""


def test_a_check_that_swallows_everything_still_needs_answers(pool):
    tests = "def check(candidate):\n  try:\n    candidate()\n  except BaseException:\n    pass"
    assert verdict(pool, "def f(): return 1", tests, "f").passed
    assert not verdict(pool, "import os\ndef f(): os._exit(0)", tests, "f").passed


def test_what_cannot_be_sent_needs_a_shared_process_and_says_that_it_can_be_cheated(pool):
    tests = "def check(candidate):\n  assert candidate(2)(3) == 6\n  assert times(1)(1) == 1"
    program = "def times(a): return lambda b: a * b"
    assert not verdict(pool, program, tests, "times").passed
    inline = verdict(pool, program, tests, "times", inline=True)
    assert inline.passed
    assert inline.cheatable
    assert inline.candidate is None
    for early in ("import os; os._exit(0)", "raise SystemExit(0)", "import sys; sys.exit(0)"):
        assert not verdict(pool, f"def times(a): {early}", tests, "times", inline=True).passed
    equal = f"{ALWAYS_EQUAL}\n    def __call__(self, b): return self\ndef times(a): return Equal()"
    assert verdict(pool, equal, tests, "times", inline=True).passed, "as documented"


def test_counts_are_those_that_pass_at_k_is_made_of(pool):
    tests = [FunctionTest(program, "add", CHECK) for program in (PLAIN, "def add(a, b): 0", PLAIN)]
    verdicts = check_all(pool, tests, LIMITS)
    assert counts(zip(("a", "a", "b"), verdicts, strict=True)) == {"a": (2, 1), "b": (1, 1)}


def test_wrong_tests_are_refused_by_name():
    with pytest.raises(ValueError, match="'f-g'; it must be a function's name"):
        FunctionTest("", "f-g", "")
    with pytest.raises(ValueError, match=r"files has \['wire.py'\]"):
        FunctionTest("", "f", "", files={"wire.py": ""})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(deadline=None, max_examples=50)
@given(VALUES)
def test_values_survive_the_wire(value):
    again = wire.decode(wire.encode(value))
    assert repr(again) == repr(value)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=40) | st.binary(max_size=10).map(lambda data: b"l3:i1:1" + data))
def test_any_other_bytes_are_no_value(data):
    try:
        value = wire.decode(data)
    except ValueError:
        return
    assert wire.decode(wire.encode(value)) == value or value != value or "nan" in repr(value)


def test_numbers_that_json_would_lose_survive():
    assert math.copysign(1, wire.decode(wire.encode(-0.0))) == -1
    assert wire.decode(wire.encode(10**5000)) == 10**5000


CANONICAL, CHEATING = (
    None,
    {
        "pass": "    pass\n",
        "sys.exit": "    import sys; sys.exit(0)\n",
        "os._exit": "    import os; os._exit(0)\n",
        "always equal": "    "
        + ALWAYS_EQUAL.strip().replace("\n", "\n    ")
        + "\n    return Equal()\n",
    },
)


@pytest.mark.slow
def test_humaneval_passes_with_its_own_solutions_and_with_no_cheat(pool):
    if not HUMANEVAL.is_file():
        pytest.skip(f"{HUMANEVAL.name} is not beside the checkout")
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    def test(row: dict, body: str) -> FunctionTest:
        trusted = row["prompt"] + "\n" + row["test"]
        return FunctionTest(row["prompt"] + body, row["entry_point"], trusted)

    solved = check_all(pool, [test(row, row["canonical_solution"]) for row in rows])
    assert [
        (row["task_id"], v.reason) for row, v in zip(rows, solved, strict=True) if v.reason
    ] == []
    assert len(solved) == 164
    cheats = list(CHEATING.values())  # a different one for each neighbour
    cheated = check_all(pool, [test(row, cheats[i % 4]) for i, row in enumerate(rows)])
    assert sum(v.passed for v in cheated) == 0
