"""Tuning: what is measured is kept, found again and never measured inside a step."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels_pallas.tuning import Key, best, measure, store, tunable, use
from kernels_pallas.tuning.command_line import main
from kernels_pallas.tuning.kernels import KERNELS
from kernels_pallas.tuning.key import code_version, version_of
from kernels_pallas.tuning.store import Choice, cache_file, read, shipped_file, write

ROOT = Path(__file__).parent.parent
KERNEL = "grouped_matmul.blocks"
SHAPE = "rows_per_group=4:d_in=4:d_out=4"
DEFAULT = {"rows": 32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")


def key(rows=64, width=64, dtype="float32", **options):
    return Key.of(KERNEL, {"rows": rows, "width": width}, dtype, "cpu", **options)


def choice(rows, code=None):
    return Choice({"rows": rows}, code or code_version(KERNEL), "measured")


NAMES = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=5)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.dictionaries(NAMES, st.integers(1, 2**40), max_size=3),
    options=st.dictionaries(NAMES, st.one_of(st.booleans(), st.integers(), NAMES), max_size=2),
    blocks=st.dictionaries(NAMES, st.one_of(st.integers(), NAMES), min_size=1, max_size=3),
    seconds=st.one_of(st.none(), st.floats(0, 10)),
    reason=st.text(max_size=20),
)
def test_what_is_written_is_read(tmp_path, sizes, options, blocks, seconds, reason):
    one = Key(KERNEL, 'A "card" of 80 GB', tuple(sorted(sizes.items())), "bfloat16",
              tuple(sorted(options.items())))  # fmt: skip
    made = Choice(blocks, "c0de", "measured", seconds, seconds, "here", "0.1", {"a=1": reason})
    path = tmp_path / "table.json"
    write(path, {one: made})
    assert read(path)[one] == made


def test_the_bucket_then_the_nearest_bucket_then_the_default():
    write(cache_file("cpu"), {key(64).bucket(): choice(1), key(1024).bucket(): choice(2)})
    write(shipped_file("cpu"), {key(64).bucket(): choice(3), key(256).bucket(): choice(4)})
    found = {rows: best(key(rows), DEFAULT)["rows"] for rows in (64, 33, 65, 200, 600, 4096, 4097)}
    assert found == {64: 1, 33: 1, 65: 1, 200: 4, 600: 2, 4096: 2, 4097: 32}
    assert best(key(64, width=1024), DEFAULT) == DEFAULT  # four octaves away
    assert best(key(64, dtype="bfloat16"), DEFAULT) == DEFAULT
    assert best(key(64, causal=True), DEFAULT) == DEFAULT
    assert best(key(64), DEFAULT, table={key(64): choice(5)}) == {"rows": 5}


def test_a_choice_that_does_not_fit_this_call_makes_way_for_the_next():
    write(cache_file("cpu"), {key(64): choice(48), key(128): choice(16)})
    divides = lambda blocks: 64 % blocks["rows"] == 0  # noqa: E731
    assert best(key(64), DEFAULT, fits=divides) == {"rows": 16}
    assert best(key(64), {"rows": 32, "columns": 8}) == {"rows": 32, "columns": 8}


def test_choices_of_other_code_are_passed_over():
    write(cache_file("cpu"), {key(64): choice(1, "0" * 16), key(128): choice(2)})
    assert best(key(64), DEFAULT) == {"rows": 2}


def test_a_generation_with_two_names_has_one_table():
    one, other = (Key.of(KERNEL, {}, "int8", kind) for kind in ("TPU v5e", "TPU v5 lite"))
    assert one == other
    assert Key.of(KERNEL, {}, "int8", "NVIDIA H200").device_kind == "NVIDIA H200"


def test_the_version_of_code_is_that_of_what_it_does():
    text = 'def f(x):\n    """Doubles."""\n    return 2 * x  # twice\n'
    assert version_of(text) == version_of("def f(x):\n\n    return (2 * x)\n")
    assert version_of(text) != version_of(text.replace("2", "3"))
    with pytest.raises(ValueError, match=r"no code at kernels_pallas/attention/cpu\.py"):
        code_version("attention.cpu")


@pytest.mark.parametrize(
    "spoiled",
    ["", '{"format": 1, "choi', "[]", '{"format": 99, "device_kind": "cpu", "choices": []}',
     '{"format": 1, "device_kind": "cpu", "choices": [{"kernel": "a.b"}]}', "\0\xff"],
)  # fmt: skip
def test_a_spoiled_cache_is_warned_of_once_and_rebuilt(spoiled):
    path = cache_file("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(spoiled)
    with pytest.warns(UserWarning, match=r"cpu\.json is left aside"):
        assert best(key(), DEFAULT) == DEFAULT
    assert best(key(), DEFAULT) == DEFAULT
    write(path, {key(): choice(8)})
    assert best(key(), DEFAULT) == {"rows": 8}


WRITER = """
import sys
from pathlib import Path
from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.store import Choice, write
for number in range(20):
    key = Key.of("a.b", {"rows": number}, sys.argv[2], "cpu")
    write(Path(sys.argv[1]), {key: Choice({"rows": number}, "c0de", "measured")})
"""


def test_writers_at_the_same_time_lose_nothing_and_readers_see_whole_files(tmp_path):
    path = tmp_path / "table.json"
    command = [sys.executable, "-c", WRITER, str(path)]
    running = [subprocess.Popen([*command, name], cwd=ROOT) for name in ("int8", "int4", "float8")]
    while any(one.poll() is None for one in running):
        read(path)  # a warning, of a file cut short, is an error here
        time.sleep(0.005)
    assert [one.returncode for one in running] == [0, 0, 0]
    assert len(read(path)) == 60
    assert sorted(file.name for file in tmp_path.iterdir()) == [".table.json.lock", "table.json"]


def looking_up(x):
    return x * best(key(x.shape[0]), DEFAULT)["rows"]


def test_a_look_up_inside_a_step_compiles_and_runs_nothing():
    write(cache_file("cpu"), {key(8).bucket(): choice(3)})
    x, compiled = jnp.ones(8), []

    def listen(event, duration_secs, **_):
        compiled.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with jax.transfer_guard("disallow"):
            traced = jax.jit(looking_up).trace(x)
        assert compiled == []
        jax.config.update("jax_enable_compilation_cache", False)  # what is found there is silent
        traced.lower().compile()
        assert len(compiled) == 1
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.monitoring.unregister_event_duration_listener(listen)
    assert str(traced.jaxpr) == str(jax.make_jaxpr(lambda x: x * 3)(x))


def test_sizes_set_by_hand_reach_functions_that_are_compiled_already():
    f, x = jax.jit(looking_up), jnp.ones(8)
    write(cache_file("cpu"), {key(8).bucket(): choice(3)})
    found = [f(x)[0]]
    with use({KERNEL: {"rows": 5}}):
        found.append(f(x)[0])
        with use(only=True):
            found.append(f(x)[0])
    with use(only=True):
        found.append(f(x)[0])
    assert [*found, f(x)[0]] == [3, 5, 5, 32, 3]


def test_a_table_of_ones_own_goes_before_the_cache(tmp_path):
    write(cache_file("cpu"), {key(8): choice(3)})
    write(tmp_path / "mine.json", {key(8): choice(7)})
    with use(table=tmp_path / "mine.json"):
        assert best(key(8), DEFAULT) == {"rows": 7}
    with pytest.raises(ValueError, match=r"'none\.json' is no file"), use(table="none.json"):
        pass


def test_wrong_sizes_by_hand_say_what_would_be_right():
    with use({KERNEL: {"row": 8}}), pytest.raises(ValueError, match=r"no .*\['row'\].*\['rows'\]"):
        best(key(), DEFAULT)
    with use({KERNEL: {"rows": 8}}), pytest.raises(ValueError, match="do not fit"):
        best(key(), DEFAULT, fits=lambda blocks: blocks["rows"] != 8)
    with pytest.raises(ValueError, match="no code"), use({"matmul.blocks": {"rows": 8}}):
        pass


def test_several_processes_do_not_read_caches_of_their_own(monkeypatch):
    write(cache_file("cpu"), {key(64): choice(1)})
    write(shipped_file("cpu"), {key(128): choice(2)})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert best(key(64), DEFAULT) == {"rows": 2}


def case(x=1.0):
    """A sum that takes as many turns as "turns" says; other sizes than these are wrong somehow."""

    def function(x):
        blocks = best(key(4), {"turns": 2000})
        turns = int(blocks["turns"])
        if turns < 0:
            raise ValueError("turns are counted from 0")
        wrong = {1: 0.5, 2: jnp.nan}.get(turns, 0.0)
        loop = lambda i, total: total + jnp.cos(x @ total) * 0  # noqa: E731
        return jax.lax.fori_loop(0, turns, loop, x) + wrong

    return tunable.Case(function, (jnp.ones((64, 64)) * x,), lambda x: x, 1e-6)


def choose(default, *turns, **limits):
    tried = [{"turns": number} for number in turns]
    found = measure.measure(key(4), case(), tried, {"turns": default}, measure.Limits(**limits))
    assert found.choice is not None
    return found, found.choice


def test_the_fastest_right_candidate_is_chosen_and_the_others_have_a_reason():
    found, chosen = choose(2000, 1000, 20, -1, 1, 2, 3000)
    assert chosen.blocks == {"turns": 20}
    assert chosen.seconds == pytest.approx(np.median(found.times["turns=20"]), rel=1e-3)
    assert set(found.times) == {"turns=20", "turns=2000"}  # the slow ones were not timed to the end
    assert len(found.times["turns=20"]) == measure.ROUNDS
    assert chosen.discarded == {
        "turns=-1": "ValueError: turns are counted from 0",
        "turns=1": "ValueError: differs from the plain function by 5.0e-01 of its largest value",
        "turns=2": "ValueError: differs from the plain function by inf of its largest value",
    }


def test_the_default_stays_unless_another_is_clearly_faster_and_may_itself_fail():
    assert choose(2000, 2001)[1].blocks == {"turns": 2000}
    chosen = choose(-1, 20)[1]
    assert (chosen.blocks, chosen.default_seconds) == ({"turns": 20}, None)
    found = measure.measure(key(4), case(), [{"turns": 1}], {"turns": -1})
    assert (found.choice, set(found.discarded)) == (None, {"turns=1", "turns=-1"})


def test_a_machine_that_slows_down_does_not_change_the_order():
    now, calls = [0.0], [0]

    def taking(seconds):
        def call():
            calls[0] += 1
            now[0] += seconds * (1 + calls[0] / 50)  # half as fast again at the end
            return jnp.zeros(())

        return measure._Candidate({"rows": int(seconds * 100)}, call, 1, False)

    alive = {"rows=12": taking(0.12), "rows=11": taking(0.11), "rows=10": taking(0.10)}
    measure._race(alive, "rows=12", (), measure.Limits(rounds=9, clock=lambda: now[0]))
    chosen = measure._chosen(key(), alive, "rows=12", {})
    assert chosen is not None
    assert chosen.blocks == {"rows": 10}
    medians = sorted((float(np.median(one.times)), name) for name, one in alive.items())
    assert [name for _, name in medians] == ["rows=10", "rows=11", "rows=12"]


def interrupting(word):
    def say(text):
        if text.startswith(word):
            raise KeyboardInterrupt

    return say


def test_an_interruption_keeps_what_enough_rounds_say():
    found, chosen = choose(2000, 20, say=interrupting("round 5"))
    assert found.interrupted
    assert chosen.blocks == {"turns": 20}
    for word in ("compiling 2", "round 3"):
        with pytest.raises(KeyboardInterrupt):
            choose(2000, 20, say=interrupting(word))


def test_a_spent_budget_measures_nothing_and_says_what_is_left(capsys):
    assert main(["tune", f"--kernels={KERNEL}", f"--shapes={SHAPE}", "--budget-seconds=0"]) == 0
    assert "6 left" in capsys.readouterr().err
    assert not cache_file("cpu").exists()


@pytest.mark.slow
def test_ctrl_c_loses_nothing_and_the_same_command_goes_on(tmp_path):
    table = tmp_path / "table.json"
    shapes = [f"rows_per_group={rows}:d_in=8:d_out=8" for rows in (2, 4)]
    # Jobs in the background of a shell ignore Ctrl-C, and what they start does too.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program = listening + "import runpy; runpy.run_module('kernels_pallas', run_name='__main__')"
    command = [sys.executable, "-c", program, "tune", f"--kernels={KERNEL}"]
    command += [f"--shapes={','.join(shapes)}", f"--table={table}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while not table.exists() and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 130, said
    kept = dict(read(table))
    assert 0 < len(kept) < 12
    assert f"interrupted: {len(kept)} kept" in said
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{12 - len(kept)} of 12 to measure" in again.stderr
    found = read(table)
    assert len(found) == 12
    assert kept.items() <= found.items()


def test_a_call_that_cannot_be_made_does_not_end_the_command(capsys, monkeypatch):
    def plain(*arguments):
        raise MemoryError("no room for 8 EiB")

    kernel = KERNELS[KERNEL]
    failing = lambda key: dataclasses.replace(kernel.case(key), plain=plain)  # noqa: E731
    monkeypatch.setitem(KERNELS, KERNEL, dataclasses.replace(kernel, case=failing))
    assert main(["tune", f"--kernels={KERNEL}", f"--shapes={SHAPE}"]) == 0
    said = capsys.readouterr().err
    assert said.count("nothing to choose; not the plain function: MemoryError: no room") == 6
    assert "6 left" in said


def test_what_was_tuned_is_shown_and_used(capsys):
    command = ["tune", f"--kernels={KERNEL}", f"--shapes={SHAPE}"]
    assert main(command) == 0
    assert "6 of 6 to measure" in capsys.readouterr().err
    table = read(cache_file("cpu"))
    assert len(table) == 6
    for one, made in table.items():
        assert best(one, KERNELS[KERNEL].default(one)) == made.blocks
    assert main(["show"]) == 0
    assert capsys.readouterr().out.count("measured") == 6
    assert main(command) == 0
    assert "0 of 6 to measure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kernels=grouped_matmul.block"], "nearest: grouped_matmul.blocks"),
        (["--shapes=8_rows_of_64_to_25"], "nearest: 8_rows_of_64_to_256"),
        ([f"--kernels={KERNEL}", "--shapes=rows=4"], r"\['d_in', 'd_out', 'rows_per_group'\]"),
        (["--kernels=attention.tpu_forward"], "runs on tpu, and this is cpu"),
        ([f"--kernels={KERNEL}", f"--shapes={SHAPE}.5"], "no positive whole number"),
    ],
)
def test_wrong_flags_say_what_would_be_right(flags, message, capsys):
    assert main(["tune", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
