"""Every checkpoint of a run is measured once, with one compilation, while the run goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time

import pytest
import tiny_evaluation

from evals import InProcess, build, evaluate
from evals.__main__ import main
from evals.curves import curves
from evals.results import read
from evals.scoring import _score
from evals.sweep import read_sweep, sweep, tokens_seen
from model.checkpoint import save
from model.checkpoint_folder import step_name

GIVEN = {"max_length": 96, "token_budget": 256}


def add(run, step, scale):
    """A checkpoint of the run, and the rows of its steps until then."""
    made = tiny_evaluation.checkpoint(scale=scale)
    save(run / "checkpoints" / step_name(step), made.config, made.params, made.files)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    tiny_evaluation.write_files(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints, the second of two training steps, which ends with the third."""
    run = tmp_path / "mine"
    (run / "checkpoints").mkdir(parents=True)
    for step, scale in ((1, 0.5), (2, 1.0)):
        add(run, step, scale)
    rows = [{"step": step, "loss": 1.0, "tokens": 100.0} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (run / "incidents.jsonl").write_text('{"kind": "spike", "step": 2}\n{"kind": "restart"}\n')
    (run / "config.json").write_text('{"train": {"steps": 3}}')
    return run


def tasks(folder, name="multiple_choice"):
    return build([name], {"multiple_choice.path": folder / "questions.jsonl"})


def test_a_sweep_has_the_values_of_each_checkpoint_and_compiles_once(folder, run, tmp_path):
    said = []
    out = tmp_path / "out"
    found = sweep(run, tasks(folder), out=out, say=said.append, **GIVEN)
    assert [(point.step, point.tokens) for point in found.points] == [(1, 100), (2, 200)]
    assert found.incidents == ((2, "spike"),)
    programs = _score._cache_size()
    alone = evaluate(
        run / "checkpoints" / step_name(2), tasks(folder), out=tmp_path / "alone", say=None, **GIVEN
    )
    [model] = alone.values()
    estimates = model["tasks"]
    swept = read(out / step_name(2))["tasks"]
    assert swept["multiple_choice"]["estimates"] == estimates["multiple_choice"]["estimates"]
    add(run, 3, 1.5)
    shutil.copytree(run / "checkpoints" / step_name(3), run / "checkpoints" / step_name(4))
    (run / "checkpoints" / step_name(4) / "commit.json").unlink()
    said.clear()
    found = sweep(run, tasks(folder), out=out, say=said.append, **GIVEN)
    assert [point.step for point in found.points] == [1, 2, 3]
    assert [line for line in said if "1 to measure" in line or "2 to measure" in line] == [
        f"checkpoint {step_name(3)}, 2 to measure",
        f"checkpoint {step_name(4)}, 1 to measure",
    ]
    assert any("passed over: half-written" in line for line in said)
    assert _score._cache_size() == programs
    shutil.rmtree(run / "checkpoints" / step_name(1))  # As a run does that keeps the last few.
    assert len(sweep(run, tasks(folder), out=out, say=None, **GIVEN).points) == 3
    [curve] = curves(out)
    assert [point.step for point in curve.points] == [1, 2, 3]


def test_only_what_was_asked_otherwise_is_measured_again(folder, run, tmp_path):
    said, out = [], tmp_path / "out"
    sweep(run, tasks(folder), out=out, say=None, **GIVEN)
    before = (out / step_name(1) / "results.json").read_bytes()
    sweep(run, tasks(folder), out=out, say=said.append, **GIVEN)
    assert said == []
    other = [dataclasses.replace(tasks(folder)[0], name="multiple_choice@again")]
    sweep(run, other, out=out, say=said.append, **GIVEN)
    assert sum("to measure" in line for line in said) == 2
    assert json.loads((out / step_name(1) / "work.json").read_text())["computed"] == 0
    names = {"multiple_choice", "multiple_choice@again"}
    assert read(out / step_name(1))["tasks"].keys() == names
    assert before != (out / step_name(1) / "results.json").read_bytes()
    said.clear()
    sweep(run, [*tasks(folder), *other], out=out, say=said.append, **GIVEN)
    assert said == []


def test_a_sweep_follows_a_run_to_its_last_step(folder, run, tmp_path):
    def train():
        time.sleep(0.5)
        add(run, 3, 2.0)

    training = threading.Thread(target=train)
    training.start()
    found = sweep(
        run, tasks(folder), out=tmp_path / "out", follow=True, poll=0.05, say=None, **GIVEN
    )
    training.join()
    assert [point.step for point in found.points] == [1, 2, 3]
    assert tokens_seen(run) == {1: 100, 2: 200, 3: 300}


def test_the_command_prints_the_matrix_and_says_what_is_wrong(folder, run, tmp_path, capsys):
    out = tmp_path / "out"
    given = [
        "multiple_choice", f"--run={run}", f"--out={out}", "--limit=8", "--max-length=96",
        f"--multiple_choice.path={folder / 'questions.jsonl'}", "--token-budget=256",
    ]  # fmt: skip
    assert main(["sweep", *given]) == 0
    shown = capsys.readouterr().out
    assert "| step | multiple_choice acc |" in shown
    assert shown.count("\n| 1 |") == shown.count("\n| 2 |") == 1
    assert [point.step for point in read_sweep(out).points] == [1, 2]
    assert main(["sweep", "multiple_choice", f"--run={tmp_path / 'no'}", *given[2:]]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    (out / "sweep.json").write_text("{}")
    assert main(["sweep", *given]) == 2
    assert "sweep.json: is not what a sweep writes" in capsys.readouterr().err


def test_bits_a_weight_are_those_of_provenance_else_of_what_is_stored():
    model = tiny_evaluation.checkpoint()
    plain = InProcess(model, **GIVEN).facts()
    assert plain["bits_per_weight"] == 32.0
    assert plain["bytes"] == 4 * plain["parameters"]
    origin = {"method": "rtn", "summary": {"bits": 4.25}}
    made = InProcess(dataclasses.replace(model, provenance=origin), **GIVEN).facts()
    assert (made["method"], made["bits_per_weight"]) == ("rtn", 4.25)
