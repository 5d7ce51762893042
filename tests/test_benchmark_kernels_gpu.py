"""The benchmark of GPU kernels without a GPU: it tells right from wrong, it outlives what breaks,
and every one of its calls is ready.
"""

import dataclasses
import functools
import importlib
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_measure, kernels_gpu
from benchmarks.gpu_case import HALF, GpuCase, Rival, Speed, normal
from benchmarks.kernels_gpu_worker import Order, Row, attempt, named_gpu, run
from kernels_pallas.gpu_topology import GPUS

CASES = kernels_gpu.cases_by_name()


def test_differences_know_nan_infinity_and_whole_numbers():
    apart = gpu_measure.apart
    truth = jnp.asarray([1.0, -4.0, -jnp.inf, jnp.nan])
    assert apart([truth, truth.at[0].set(1.5)], [truth, truth]) == [0, 0.125]
    for broken in (truth.at[0].set(jnp.nan), truth.at[2].set(jnp.inf), truth.at[3].set(0)):
        assert apart(broken, truth) == [float("inf")]
    assert apart(truth[:2], truth) == [float("inf")]
    large = jnp.asarray([2**30, 5])
    assert apart(large, large) == [0]
    assert apart(large + jnp.asarray([1, 0]), large)[0] > 0


def case(kernel, **fields):
    """A call whose poison is a NaN in the last row, which no result may depend on."""

    def plain(x):
        return x[:-1] * 2

    return GpuCase(
        "doubling",
        lambda key: (normal(key, 65, 64),),
        kernel,
        plain,
        HALF,
        True,
        poison=lambda x: (x.at[-1].set(jnp.nan),),
        **fields,
    )


def broken(x):
    raise RuntimeError("out of\nregisters")


def checked(one, tmp_path):
    row = Row(one.name)
    work = functools.partial(run, row, one, {"copy": 1e9}, float("inf"), str(tmp_path / "rows"))
    assert attempt(row, work)
    return row


def test_a_wrong_kernel_a_leak_and_an_error_are_rows(tmp_path):
    assert checked(case(lambda x: x[:-1] + x[:-1]), tmp_path).state == "right"
    wrong = checked(case(lambda x: x[:-1] * 2.05), tmp_path)
    assert wrong.state == "wrong"
    assert kernels_gpu.error_of(wrong).endswith("e-02 / 7.8e-03")
    leak = checked(case(lambda x: x[:-1] * 2 + 0 * x[-1]), tmp_path)
    assert (leak.state, leak.apart) == ("wrong", [None])
    failed = checked(case(broken), tmp_path)
    assert (failed.state, failed.error) == ("failed", "RuntimeError: out of registers")


def test_times_become_shares_goals_and_ratios(tmp_path):
    def missing(x):
        import no_such_library  # noqa: F401 # pyright: ignore

    rivals = (
        Rival("itself", lambda x: x[:-1] * 2),
        Rival("missing", missing),
        Rival("ill", broken),
    )
    speed = Speed(64.0, 8192.0, "copy", goal=1e9, rivals=rivals)
    row = checked(case(lambda x: x[:-1] * 2, speed=speed), tmp_path)
    assert row.seconds is not None
    assert row.share == pytest.approx(8192 / row.seconds / 1e9)
    assert row.met is False
    assert row.rivals["itself"] > 0
    assert row.rivals["missing"] == "not installed"
    assert row.rivals["ill"] == "RuntimeError: out of registers"
    cells = kernels_gpu.cells_of(row)
    assert cells[7].endswith("of copy not met")
    assert "itself: " in cells[8]


SCRIPT = "import sys, time; open({path!r}, 'a').write({text!r}); {then}"
FIRST, SECOND, RIVALS = (
    Row("first", "right"),
    Row("second", "right", seconds=1e-3, rivals={"cuDNN": 2e-3}, done=False),
    Row("second", "right", seconds=1e-3, rivals={"cuDNN": 2e-3}),
)


@pytest.mark.parametrize(
    ("written", "then", "last"),
    [
        ([FIRST], "time.sleep(60)", "failed"),
        ([FIRST], "sys.exit('illegal address')", "failed"),
        ([FIRST, SECOND], "sys.exit('illegal address')", "right"),
        ([FIRST, SECOND, RIVALS], "sys.exit(0)", "right"),
    ],
    ids=["hangs", "dies", "a rival dies", "goes on"],
)
def test_a_process_that_ends_costs_one_row(written, then, last, tmp_path, monkeypatch):
    path = tmp_path / "rows"
    path.touch()
    text = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in written)
    command = [sys.executable, "-c", SCRIPT.format(path=str(path), text=text, then=then)]
    monkeypatch.setattr(kernels_gpu, "PATIENCE", 2.0)
    monkeypatch.setattr(
        kernels_gpu,
        "start",
        lambda order, said: subprocess.Popen(command, stdout=said, stderr=said),
    )
    order = Order(["first", "second"], str(path), 60.0)
    with path.open("rb") as file:
        rows = list(kernels_gpu.rows_of_a_process(order, file, time.monotonic() + 60))
    assert rows[0] == FIRST
    assert [row.name for row in rows] == ["first", "second"]
    assert rows[1].state == last
    assert rows[1].done
    if then != "sys.exit(0)":
        said = rows[1].error + str(rows[1].rivals)
        assert ("illegal address" if "exit" in then else "nothing for 2 s") in said


def test_wrong_arguments_say_what_would_be_right(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert kernels_gpu.main(["--kernels=attentoin"]) == 2
    assert "'attentoin' is not one of attention, decode" in capsys.readouterr().err
    assert kernels_gpu.main(["--dry-run", "--match=nothing like it"]) == 2
    assert "finds no call" in capsys.readouterr().err
    assert kernels_gpu.main(["--match=decode, one query"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_names_are_unique_and_goals_come_first():
    names = kernels_gpu.chosen(kernels_gpu.parse([]))
    assert sorted(names) == sorted(["ceilings", *CASES])
    modules = (importlib.import_module(module) for module in kernels_gpu.KERNELS.values())
    assert len(CASES) == sum(len(module.cases(tiny=True)) for module in modules)
    assert names[0] == "ceilings"
    goals = {"attention forward, llama3_8b", "attention backward, llama3_8b", "decode, llama3_8b"}
    assert goals < set(names[1:12])


@pytest.mark.slow
def test_a_dry_run_checks_the_plain_function_and_compiles_the_kernel(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    match = "--match=decode, one query|product, int4, one row"
    assert kernels_gpu.main(["--dry-run", match, f"--out={path}", "--markdown"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(path.read_text().splitlines()) == 2
    for row in rows:
        assert row[1].strip().startswith("right; ")
        assert "registers" in row[1] or "lowers, 1 kernels" in row[1]
        assert all(cell.strip() == "-" for cell in row[3:])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_call_is_taken_by_its_kernel_and_gives_what_the_plain_function_does(name):
    one = CASES[name]
    shapes = jax.eval_shape(one.make, jax.eval_shape(jax.random.key, 0))
    expected = jax.eval_shape(one.plain, *shapes)
    if one.poison is not None:
        assert jax.eval_shape(one.poison, *shapes) == shapes
    if one.served:
        with jax.sharding.use_abstract_mesh(named_gpu(GPUS["h200"].device_kind)):
            assert jax.eval_shape(one.kernel, *shapes) == expected
