"""Flags of `train.py`: every field can be set; what is wrong is named with what would be right."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from training.command_line import parse
from training.config import (
    ConfigError,
    RunConfig,
    config_dict,
    default_config,
    describe,
    run_config,
)

ROOT = Path(__file__).parent.parent
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"


def test_every_kind_of_field_can_be_set_from_the_command_line():
    config = parse(
        [
            QUICKSTART,
            "--config.train.steps=1e3",
            "--config.mesh.fsdp=4",
            "--config.optimizer.learning_rate=2e-3",
            "--config.model.tied_embeddings=false",
            "--config.model.kv_heads=none",
            "--config.model.rope_scaling.kind=llama3",
            "--config.model.rope_scaling.factor=8",
            "--config.optimizer.decay=('head/.*',)",
            "--config.data.sources=({'path': 'a.txt', 'weight': 3}, {'path': 'b.txt'})",
            "--config.data.path=",
            "--config.name",
            "1e3",
        ]
    ).config
    assert config is not None
    assert config.train.steps == 1000
    assert config.mesh.fsdp == 4
    assert config.optimizer.learning_rate == 2e-3
    assert config.optimizer.decay == ("head/.*",)
    assert config.name == "1e3"
    assert config.model is not None
    assert config.model.tied_embeddings is False
    assert config.model.kv_heads is None
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 8.0
    assert config.data is not None
    assert [source.weight for source in config.data.sources] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.stpes=3", r"config.train.stpes: no such field; nearest: steps"),
        ("--config.steps=3", r"no such field.*there is config.train.steps"),
        ("--config.tran.steps=3", r"config.tran: no such field; nearest: train"),
        ("--config.train.steps=many", r"config.train.steps=many: expected int"),
        ("--config.train.steps=1.5", r"expected a whole number"),
        ("--config.train.steps=0", r"train.steps=0 must be at least 1"),
        ("--config.model.tied_embeddings=maybe", r"expected true or false"),
        ("--config.train=3", r"set one of its fields: steps, "),
        ("--config.train.steps.x=3", r"steps is a int, it has no fields"),
        ("--config.optimizer.name=adamm", r"optimizer.name.*adamw"),
        ("--config.model.activation=silo", r"activation.*silu"),
        ("--config.model.kv_heads=4", r"kv_heads"),
        ("--config.schedule.name=cosin", r"schedule.name.*cosine"),
        ("--config.train.remat=everything", r"remat"),
        ("--config.data.length=-1", r"data.length=-1"),
        ("--workdri=x", r"--workdri: no such flag; nearest: workdir"),
        ("--to-step", r"--to-step needs a value"),
        ("stray", r"'stray': expected a flag"),
    ],
)
def test_a_wrong_flag_names_itself_and_what_is_right(argument, message):
    with pytest.raises(ConfigError, match=message):
        parse([QUICKSTART, argument])


def test_a_missing_config_file_names_its_neighbours():
    with pytest.raises(ConfigError, match=r"no such file; nearest: .*configs/quickstart.py"):
        parse([f"--config={ROOT}/configs/quikstart.py"])
    with pytest.raises(ConfigError, match=r"--config=FILE is missing"):
        parse([])
    with pytest.raises(ConfigError, match=r"--replay needs --to-step"):
        parse(["--replay=runs/x"])


def test_a_typo_in_a_config_file_is_named(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from training import default_config\n"
        "def get_config():\n    c = default_config()\n    c.train.stepz = 3\n    return c\n"
    )
    with pytest.raises(ConfigError, match=r"bad.py.*stepz"):
        parse([f"--config={bad}"])


def test_every_field_has_a_line_of_help_and_the_help_prints_it():
    rows = describe(RunConfig, default_config())
    assert [name for name, _, _, doc in rows if not doc] == []
    text = parse([QUICKSTART, "--help"]).help_text
    assert all(f"--{name}=" in text for name, _, _, _ in rows)
    assert "--config.name='quickstart'" in text


def test_a_config_survives_its_json_form():
    config = parse([QUICKSTART]).config
    assert config is not None
    assert run_config(dataclasses.asdict(config)) == config


def test_defaults_of_a_config_file_are_those_of_the_dataclasses():
    values = default_config().to_dict()
    for part in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(part.default):
            for field in dataclasses.fields(part.default):
                default = config_dict(getattr(part.default, field.name))
                assert values[part.name][field.name] == default


def test_wrong_input_ends_with_one_line_and_status_2():
    done = subprocess.run(
        [sys.executable, "train.py", QUICKSTART, "--config.train.stepss=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nearest: steps" in done.stderr
