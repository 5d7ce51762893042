"""The sweep over quantization methods: its figures are those of the models, and it goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import quantization
from benchmarks.quantization_cases import VARIANTS, Variant, cases, chosen, variants
from benchmarks.quantization_claims import judge
from benchmarks.quantization_measure import bootstrap_error
from benchmarks.quantization_plot import Point, frontier, means
from data import ByteTokenizer, open_source
from model import ModelConfig, checkpoint, forward, init
from surgery import METHODS, InMemory, consecutive, quantize
from surgery.quantize.rtn import RoundToNearest

CONFIG = ModelConfig(
    vocab_size=264,
    d_model=32,
    num_layers=2,
    num_heads=2,
    d_ff=32,
    max_length=32,
    tied_embeddings=True,
)
WORDS = "the cat sat on the mat and saw an old dog run while it rained. " * 40


@pytest.fixture
def command(tmp_path):
    """A model with sharp opinions and its text, as arguments."""
    params = jax.tree.map(lambda leaf: 3 * leaf, init(CONFIG, jax.random.key(0)))
    folder = checkpoint.save(tmp_path / "model", CONFIG, params, ByteTokenizer().files())
    text = tmp_path / "text.txt"
    text.write_text(WORDS)
    sizes = ("--windows=4", "--held-out-windows=4", "--rounds=1", "--decode-tokens=4")
    rows = f"--out={tmp_path / 'rows.jsonl'}"
    return [f"--checkpoint={folder}", f"--text={text}", f"--held-out={text}", *sizes, rows]


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def log_probabilities(params, tokens):
    logits = np.asarray(forward(params, tokens, CONFIG)[0], np.float64)[:, :-1]
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


@pytest.mark.slow
def test_figures_are_those_of_the_models_and_finished_rows_are_kept(command, tmp_path, capsys):
    sweep = [*command, "--methods=rtn,smoothquant", "--bits=8,2", "--groups=16,12"]
    sweep += [f"--plot={tmp_path / 'plot.svg'}", f"--table={tmp_path / 'table.md'}"]
    assert quantization.main(sweep) == 0
    rows = rows_of(tmp_path)
    assert [row["state"] for row in rows] == ["measured", *("measured", "left out") * 2, "measured"]
    assert "group=12 does not divide the 32 inputs" in rows[2]["error"]
    plain, eight, _, two, _, smooth = rows
    params = checkpoint.load(tmp_path / "model").params
    held_out = consecutive(open_source(str(tmp_path / "text.txt")), ByteTokenizer(), 32, 4).tokens
    coded, layers = quantize(InMemory(CONFIG, params), RoundToNearest(bits=2, group=16))
    truth = log_probabilities(params, held_out)
    found = log_probabilities(jax.tree.map(jnp.asarray, coded), held_out)
    ahead = held_out[:, 1:, None]
    before, after = (-np.take_along_axis(p, ahead, -1)[..., 0] for p in (truth, found))
    divergence = np.sum(np.exp(truth) * (truth - found), axis=-1)
    np.testing.assert_allclose(plain["nll"], before.mean(), rtol=1e-5)
    np.testing.assert_allclose(two["window_nll"], after.mean(axis=1), atol=1e-4)
    np.testing.assert_allclose(two["delta_nll"], (after - before).mean(), atol=1e-4)
    np.testing.assert_allclose(two["kl"], divergence.mean(), rtol=1e-3)
    assert two["top1"] == pytest.approx(np.mean(truth.argmax(-1) == found.argmax(-1)))
    assert two["honest_bits"] == pytest.approx(np.mean([row["bits"] for row in layers]))
    assert (eight["nominal_bits"], two["nominal_bits"]) == (8, 2)
    assert 0 < eight["kl"] < two["kl"]
    assert eight["bytes_on_disk"] < plain["bytes_on_disk"]
    assert all(row["decode_ratio"] > 0 for row in (eight, two, smooth))
    assert "unquantized" in (tmp_path / "plot.svg").read_text()

    nll = [row["window_nll"] for row in rows if "window_nll" in row]
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    capsys.readouterr()
    assert quantization.main(sweep) == 0
    assert [row["window_nll"] for row in rows_of(tmp_path) if "window_nll" in row] == nll
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1  # only the row whose line was torn
    assert said.err.startswith("smoothquant, 8 bits, seed 0: 9.000 bits")
    table = (tmp_path / "table.md").read_text().splitlines()[2:]
    table = [line for line in table if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == [row["name"] for row in rows]


@pytest.mark.slow
def test_planted_outliers_hurt_coded_activations_and_not_the_model(command, tmp_path):
    one = [*command, "--methods=int8_plain", "--bits=8", "--decode-tokens=0"]
    assert quantization.main(one) == 0
    assert quantization.main([*one, "--inject=4x60"]) == 0
    plain, coded, planted, hurt = rows_of(tmp_path)
    assert planted["nll"] == pytest.approx(plain["nll"], abs=1e-4)
    assert hurt["kl"] > 10 * coded["kl"]


def test_every_method_has_rows_and_wrong_arguments_say_what_would_be_right(command, capsys):
    assert {variant.method for variant in variants().values()} == set(METHODS)
    every = list(cases(chosen([]), (8, 4, 3, 2), (64, 0), (0, 1)))
    assert {case.method for case in every} == set(METHODS)
    assert all(case.build() for case in every)
    assert len({case.label for case in every}) == len(every)
    assert {(c.bits, c.group) for c in every if c.method == "nf4"} == {(4, 64), (4, 0)}
    seeds = [(c.bits, c.seed) for c in every if c.name == "awq" and c.group == 64]
    assert seeds == [(8, 0), *[(bits, seed) for bits in (4, 3, 2) for seed in (0, 1)]]
    planted = list(cases(chosen([]), (8, 4, 3, 2), (64,), (0,), planted=True))
    assert {c.name for c in planted} == {"rtn", "awq", "smoothquant", "int8", "int8_plain"}
    assert all(c.label.endswith("outliers planted") for c in planted)
    assert chosen(["int8"]) == {"int8": VARIANTS["int8"]}
    assert list(chosen(["gptq", "nf4_double"])) == ["gptq", "nf4_double"]
    for flag, said in (
        ("--methods=gptk", "'gptk' is neither a method nor a variant; near: gptq"),
        ("--bits=4,9", "9 is not 2 to 8"),
        ("--inject=4by60", "channels and factor, like 4x60"),
        ("--plot=table.doc", "must end with .svg, .png or .pdf"),
        ("--windows=0", "--windows=0: give 1 or more"),
    ):
        with pytest.raises(SystemExit):
            quantization.main([*command, flag])
        assert said in capsys.readouterr().err
    assert quantization.main([*command, "--windows=9999"]) == 2
    assert "too few for 9999 windows" in capsys.readouterr().err
    assert quantization.main(["--checkpoint=nowhere", *command[1:]]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_method_that_no_variant_names_runs_by_its_own_settings(monkeypatch):
    monkeypatch.setitem(METHODS, "new", METHODS["gptq"])
    assert variants()["new"] == Variant("new")
    found = list(cases(chosen(["new"]), (3,), (32, 0), (0,)))
    assert [dict(case.settings) for case in found] == [
        {"bits": 3, "group": 32},
        {"bits": 3, "group": -1},
    ]


def test_errors_are_of_paired_windows_and_lines_leave_out_what_is_beaten():
    rng = np.random.default_rng(0)
    differences = rng.normal(size=400)
    expected = differences.std() / np.sqrt(400)
    assert bootstrap_error(differences) == pytest.approx(expected, rel=0.06)
    assert bootstrap_error(np.full(5, 0.3)) == pytest.approx(0)
    pairs = ((4.5, 0.1), (4.0, 0.3), (4.2, 0.4), (8.0, 0.1), (2.0, float("inf")))
    line = frontier([Point(bits, delta, 0.0) for bits, delta in pairs])
    assert [point.bits for point in line] == [2.0, 4.0, 4.5]


def test_a_line_is_along_means_of_seeds_and_not_along_the_luckiest():
    same = {"bits": 3, "group": 64, "honest_bits": 3.25, "delta_error": 0.01}
    rows = [{**same, "seed": seed, "delta_nll": delta} for seed, delta in ((0, 0.1), (1, 0.3))]
    rows.append({**same, "group": 0, "honest_bits": 3.0, "delta_nll": 0.4})
    found = frontier(means(rows))
    assert [point.delta for point in found] == pytest.approx([0.4, 0.2])


def test_a_claim_is_judged_by_windows_and_by_the_spread_of_seeds():
    rng = np.random.default_rng(0)
    windows = 3 + rng.normal(size=100)  # what they have in common falls out of differences
    noise = rng.normal(scale=0.02, size=(5, 100))

    def row(name, bits, loss, number, group=64, seed=None, inject=None):
        own = (windows + loss + noise[number]).tolist()
        shown = {"name": name, "bits": bits, "group": group, "seed": seed, "inject": inject}
        return {"state": "measured", "window_nll": own, **shown}

    plain = [
        row("unquantized", None, 0, 0, None),
        row("unquantized", None, 0, 0, None, None, "4x60"),
    ]
    rows = [*plain, row("rtn", 3, 0.10, 1), row("rtn", 4, 0.015, 1)]
    rows += [row("gptq", 3, 0.05 + off, 2, seed=seed) for seed, off in enumerate((-0.01, 0, 0.01))]
    rows += [row("gptq", 4, 0.020 + off, 3, seed=seed) for seed, off in enumerate((-0.01, 0, 0.01))]
    rows += [row("int8", 8, 0.0, 4, None, 0, "4x60"), row("int8_plain", 8, 0.5, 4, None, 0, "4x60")]
    found = {one.claim: one for one in judge(rows)}
    assert {claim: one.word for claim, one in found.items()} == {
        "gptq 4 bits, groups of 64: loses less than rtn 4 bits, groups of 64": "not decided",
        "gptq 3 bits, groups of 64: loses less than rtn 3 bits, groups of 64": "holds",
        "gptq 3 bits, groups of 64: loses at most 0.8 of rtn 3 bits, groups of 64": "holds",
        "int8 8 bits, outliers planted: loses at most 0.001 nats": "not decided",
        "int8_plain 8 bits, outliers planted: loses more than 0.001 nats": "holds",
    }
    three = found["gptq 3 bits, groups of 64: loses less than rtn 3 bits, groups of 64"]
    over_windows = np.std(noise[2] - noise[1]) / 10
    assert three.difference == pytest.approx(-0.05 + np.mean(noise[2] - noise[1]))
    assert three.error == pytest.approx(np.hypot(over_windows, 0.01), rel=0.02)
    assert three.seeds == 3
    worse = [*plain, row("rtn", 3, 0.010, 1), row("gptq", 3, 0.05, 2, seed=0)]
    assert judge(worse)[0].word == "does not hold, little lost"
