"""The benchmarks of a training run still run: a user's own table is one command away."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from data import ByteTokenizer
from model import ModelConfig, init
from model.checkpoint import save

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """A script of benchmarks/ as a user runs it: in a process of its own, on one CPU device."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_training_step_is_measured_and_agrees_with_torch_where_there_is_one(tmp_path):
    done = run("train_step", "--steps=2", "--types=float32", "--tiny", "--markdown", cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert "| Sheaf | float32 |" in rows[-1]
    if len(rows) == 4:
        assert "Same weights, same batch" in done.stdout
    else:
        assert "not installed" in done.stdout


@pytest.mark.slow
def test_generation_is_measured_and_chooses_the_tokens_of_transformers_where_there_is_one(tmp_path):
    sizes = ("--rounds=1", "--steps=7", "--types=float32", "--tiny")
    done = run("generate", *sizes, "--sides=torch,sheaf", "--markdown", cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert "| Sheaf | float32 |" in rows[-1]
    assert "float32 roofline" in done.stdout
    said = "100.0% of the greedy tokens are the same" if len(rows) == 4 else "not installed"
    assert said in done.stdout


@pytest.mark.slow
def test_the_character_setting_trains_on_any_text_and_compares_with_the_published_loss(tmp_path):
    letters = random.Random(0).choices("abcdefgh \n", k=12_000)
    (tmp_path / "letters.txt").write_text("".join(letters))
    text, workdir = f"--text={tmp_path}/letters.txt", f"--workdir={tmp_path}/run"
    done = run("shakespeare", text, workdir, "--steps=3", cache=tmp_path)
    assert "cpu: 3 steps" in done.stdout, done.stdout + done.stderr
    assert "nanoGPT 1.88 after 2000 steps" in done.stdout
    assert done.returncode == 1  # three steps do not reach it
    assert (tmp_path / "run" / "loss.png").is_file()


@pytest.mark.slow
def test_mixtures_are_measured_beside_a_dense_model(tmp_path):
    done = run("mixtures", "--tiny", "--rounds=1", cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert [len(row) for row in rows] == [4] * 7
    assert rows[-1][0].strip() == "decoding at batch 1, tokens/s"


def test_wrong_arguments_say_what_would_be_right(tmp_path):
    missing = run("shakespeare", "--text=nowhere.txt", cache=tmp_path)
    assert "--text=nowhere.txt: no such file" in missing.stderr
    (tmp_path / "a.txt").write_text("a")
    steps = run("shakespeare", f"--text={tmp_path}/a.txt", "--steps=9999", cache=tmp_path)
    assert "--steps=9999: from 1 to 2000" in steps.stderr
    types = run("train_step", "--types=float31", cache=tmp_path)
    assert "'float31' is not one of float32, bfloat16" in types.stderr
    sides = run("generate", "--sides=jax", cache=tmp_path)
    assert "'jax' is not one of torch, compiled, sheaf" in sides.stderr
    cases = run("serving", "--cases=prefix,nothing", cache=tmp_path)
    assert "'nothing' is not one of continuous, prefix, chunks" in cases.stderr


@pytest.mark.slow
def test_the_variants_of_a_model_are_made_and_measured_by_task(tmp_path):
    config = ModelConfig(
        vocab_size=264, d_model=64, num_layers=1, num_heads=2, d_ff=64, max_length=192
    )
    params = init(config, jax.random.key(0))
    save(tmp_path / "small", config, params, ByteTokenizer().files())
    rng = random.Random(0)
    words = rng.choices(["".join(rng.choices("abcdefgh", k=5)) for _ in range(100)], k=2500)
    (tmp_path / "words.txt").write_text(" ".join(words))
    given = (
        f"--checkpoint={tmp_path}/small", f"--text={tmp_path}/words.txt", f"--out={tmp_path}/out",
        f"--held-out=words={tmp_path}/words.txt", "--variants=rtn-4,gptq-3", "--samples=2",
        f"--table={tmp_path}/table.md",
    )  # fmt: skip
    done = run("evals_lab", *given, cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    heads, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert "cloze@words acc" in heads
    assert "word_order@words acc" in heads
    assert rows[0].split(" | ")[:2] == ["| small", "32.00"]
    for name, row in zip(("rtn-4", "gptq-3"), rows[1:], strict=True):
        origin = json.loads((tmp_path / "out" / "variants" / name / "provenance.json").read_text())
        assert row.split(" | ")[:2] == [f"| {name}", f"{origin['summary']['bits']:.2f}"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert "making" not in run("evals_lab", *given, cache=tmp_path).stderr
