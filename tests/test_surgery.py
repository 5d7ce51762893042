"""Surgery from checkpoint to checkpoint: tiny models in memory and on disk."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import ByteTokenizer
from model import ModelConfig, Runtime, checkpoint, forward, init
from model.checkpoint_folder import CheckpointError
from sharding import MeshConfig, make_layout, make_mesh
from surgery import (
    METHODS,
    Folder,
    InMemory,
    Options,
    Text,
    blocks,
    perplexity,
    quantize,
    quantize_checkpoint,
)
from surgery.__main__ import main
from weights import Grouped, bits_per_weight, flatten, is_format, map_with_path

CONFIG = ModelConfig(
    vocab_size=264,
    d_model=32,
    num_layers=2,
    num_heads=2,
    d_ff=32,
    max_length=32,
    tied_embeddings=True,
)
TOKENS = np.random.default_rng(0).integers(0, 256, (8, 16)).astype(np.int32)
WORDS = "the cat sat on the mat and saw an old dog run while it rained. " * 40


def params_of(config=CONFIG, seed=0):
    return init(config, jax.random.key(seed))


def logits(params, config=CONFIG, tokens=TOKENS):
    return np.asarray(forward(params, tokens, config)[0])


@pytest.fixture
def saved(tmp_path):
    """A checkpoint and text beside it."""
    folder = checkpoint.save(tmp_path / "model", CONFIG, params_of(), ByteTokenizer().files())
    (tmp_path / "text.txt").write_text(WORDS)
    return folder


def text_of(folder):
    data = str(folder.parent / "text.txt")
    return Text(data=data, windows=8, length=16, evaluate=data, evaluate_windows=4)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_rounding_gives_the_codes_of_numpy_and_leaves_the_rest():
    params = params_of()
    found, rows = quantize(InMemory(CONFIG, params), METHODS["rtn"](bits=3, group=16))
    weight = found["layers"]["000-002"]["feed_forward"]["down"]["kernel"]
    w = np.asarray(params["layers"]["000-002"]["feed_forward"]["down"]["kernel"], np.float64)
    by_group = w.reshape(2, 2, 16, 32)
    low, high = np.minimum(by_group.min(2), 0), np.maximum(by_group.max(2), 0)
    scale = np.float64(np.float16((high - low) / 7))[:, :, None]
    zero = np.round(-low / ((high - low) / 7))[:, :, None]
    expected = scale * (np.clip(np.round(by_group / scale) + zero, 0, 7) - zero)
    np.testing.assert_allclose(weight.dequantize(), expected.reshape(w.shape), rtol=1e-6, atol=1e-9)
    for path, leaf in flatten(found).items():
        assert is_format(leaf) == path.endswith("kernel"), path
        if not is_format(leaf):
            np.testing.assert_array_equal(leaf, flatten(params)[path])
    assert len(rows) == 2 * 7
    assert all(row["nominal_bits"] == 3 and row["bits"] > 3 for row in rows)


def test_gptq_loses_less_than_rounding_in_every_layer():
    params = params_of()
    model = InMemory(CONFIG, params)
    found, rows = quantize(model, METHODS["gptq"](bits=3, group=16), TOKENS)
    plain, _ = quantize(model, METHODS["rtn"](bits=3, group=16))
    exact = logits(params)
    assert np.mean((logits(found) - exact) ** 2) < 0.7 * np.mean((logits(plain) - exact) ** 2)
    assert [row["path"] for row in rows[:4]] == [
        f"attention/{name}/kernel" for name in ("query", "key", "value", "output")
    ]
    assert all(row["damping"] == pytest.approx(0.01) for row in rows)
    assert all(0 < row["proxy_loss"] < row["weight_error"] for row in rows)


def test_gptq_in_float64_and_on_a_block_measured_once_comes_close():
    model = InMemory(CONFIG, params_of())
    _, rows = quantize(model, METHODS["gptq"](group=16), TOKENS)
    for method, options in (
        (METHODS["gptq"](group=16, precision="float64"), Options()),
        (METHODS["gptq"](group=16), Options(order="all")),
    ):
        found, others = quantize(model, method, TOKENS, options=options)
        assert [row["path"] for row in others] == [row["path"] for row in rows]
        losses = [[row["proxy_loss"] for row in each] for each in (others, rows)]
        assert np.mean(losses[0]) == pytest.approx(np.mean(losses[1]), rel=0.1)
        assert all(leaf.dtype.itemsize <= 4 for leaf in jax.tree.leaves(found))


def test_a_run_that_was_killed_goes_on_to_the_same_bits(saved, tmp_path):
    class Killed(Exception):
        pass

    def kill(done, total, text):
        if done == 1:
            raise Killed

    method, text = METHODS["gptq"](group=16), text_of(saved)
    quantize_checkpoint(saved, tmp_path / "whole", "gptq", method, text=text)
    with pytest.raises(Killed):
        quantize_checkpoint(saved, tmp_path / "again", "gptq", method, text=text, progress=kill)
    assert not (tmp_path / "again").exists()
    with pytest.raises(CheckpointError, match="holds an unfinished run with settings"):
        quantize_checkpoint(saved, tmp_path / "again", "gptq", METHODS["gptq"](group=32), text=text)
    seen = []
    quantize_checkpoint(
        saved,
        tmp_path / "again",
        "gptq",
        method,
        text=text,
        progress=lambda done, total, note: seen.append((done, total)),
    )
    assert seen == [(2, 2)]
    whole, again = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "again")
    equal(whole.params, again.params)
    rows = [json.loads(line) for line in again.files["quantization.jsonl"].splitlines()]
    assert [row["layer"] for row in rows] == [layer for layer in range(2) for _ in range(7)]
    assert not list(tmp_path.glob("*.working"))


def test_a_checkpoint_says_what_it_is_made_of_and_reads_like_any_other(saved, tmp_path):
    out = tmp_path / "small"
    summary = quantize_checkpoint(
        saved, out, "gptq", METHODS["gptq"](group=16), text=text_of(saved)
    )
    found = checkpoint.load(out)
    assert found.provenance["method"] == "gptq"
    assert found.provenance["parents"] == [str(saved)]
    assert found.provenance["settings"]["group"] == 16
    assert found.provenance["summary"] == summary
    calibration = json.loads(found.files["calibration.json"])
    assert calibration["n_sequences"] == 8
    assert calibration == found.provenance["calibration"]
    assert "sheaf_tokenizer.json" in found.files
    held_out = np.frombuffer(WORDS.encode(), np.uint8)[: 4 * 16].reshape(4, 16).astype(np.int32)
    for params, name in ((params_of(), "before"), (found.params, "after")):
        scores = jax.nn.log_softmax(jnp.asarray(logits(params, tokens=held_out)))[:, :-1]
        chosen = np.take_along_axis(np.asarray(scores), held_out[:, 1:, None], axis=-1)
        assert summary[f"perplexity_{name}"] == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)
    layout = make_layout(make_mesh(MeshConfig(data=8)))
    equal(checkpoint.load(out, layout).params, found.params)
    assert perplexity(Folder(out), held_out) == pytest.approx(summary["perplexity_after"], rel=1e-5)


def test_on_a_mesh_it_comes_to_the_same():
    params = params_of()
    layout = make_layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    method = METHODS["gptq"](group=16)
    alone, _ = quantize(InMemory(CONFIG, params), method, TOKENS)
    together, _ = quantize(InMemory(CONFIG, params), method, TOKENS, runtime=Runtime(layout=layout))
    exact = logits(params)
    off = np.abs(logits(together) - logits(alone)).max()
    assert off < 0.2 * np.abs(logits(alone) - exact).max()  # a tie may fall to the other side
    with pytest.raises(ValueError, match="6 calibration windows do not divide over 4 devices"):
        quantize(InMemory(CONFIG, params), method, TOKENS[:6], runtime=Runtime(layout=layout))


def test_experts_are_rounded_one_by_one_and_refused_by_methods_that_calibrate():
    config = ModelConfig(
        vocab_size=264,
        d_model=32,
        num_layers=2,
        num_heads=2,
        feed_forward="experts",
        num_experts=4,
        expert_d_ff=32,
    )
    params = params_of(config)
    found, rows = quantize(InMemory(config, params), METHODS["rtn"](bits=8, group=32))
    off = np.abs(logits(found, config) - logits(params, config)).max()
    assert 0 < off < 0.02 * np.abs(logits(params, config)).max()
    assert {row["path"] for row in rows} >= {"feed_forward/experts/down/kernel"}
    assert not any("router" in row["path"] for row in rows)
    with pytest.raises(ValueError, match=r"holds experts, for which AWQ has no rule.*--keep="):
        quantize(InMemory(config, params), METHODS["awq"](group=32), TOKENS)
    keep = Options(keep="router|experts")
    kept, rows = quantize(InMemory(config, params), METHODS["gptq"](group=32), TOKENS, options=keep)
    assert len(rows) == 2 * 4
    equal(kept["layers"]["000-002"]["feed_forward"], params["layers"]["000-002"]["feed_forward"])


def test_only_what_is_asked_for_is_quantized():
    options = Options(targets=r"feed_forward/(up|down)")
    found, rows = quantize(InMemory(CONFIG, params_of()), METHODS["rtn"](group=16), options=options)
    assert {row["path"] for row in rows} == {"feed_forward/up/kernel", "feed_forward/down/kernel"}
    formats = [path for path, leaf in flatten(found).items() if isinstance(leaf, Grouped)]
    assert len(formats) == 2
    with pytest.raises(
        ValueError, match=r"leaves nothing to quantize; .* feed_forward/down/kernel"
    ):
        quantize(
            InMemory(CONFIG, params_of()),
            METHODS["rtn"](group=16),
            options=Options(targets="feed_forward/dwn/kernel"),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rtn", "--group=24"], "inputs of this matrix; nearest that do: 16, 32"),
        (["rtn", "--bits=9"], "bits=9; a grid has codes of 2 to 8 bits"),
        (["gptq", "--group=16"], "give calibration text with --data=FILE"),
        (["gptq", "--group=16", "--data={}", "--windows=999"], "too few for 999 windows of 32"),
        (["gptq", "--group=16", "--data=nothing.txt"], "nothing.txt"),
        (["gptq", "--statistics=alive"], "nearest: live"),
        (["rtn", "--group=16", "--targets=("], "no regular expression"),
        (["rtn", "--group=16", "--checkpoint=nothing"], "nothing: no such folder"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(saved, capsys, arguments, message):
    out, data = saved.parent / "out", saved.parent / "text.txt"
    name, *rest = (argument.replace("{}", str(data)) for argument in arguments)
    assert main([name, f"--checkpoint={saved}", f"--out={out}", *rest]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("python -m surgery: ")
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model", "text.txt"]


def test_quantized_unfinished_and_sick_models_are_refused(saved, tmp_path):
    rtn = METHODS["rtn"](group=16)
    quantize_checkpoint(saved, tmp_path / "small", "rtn", rtn)
    with pytest.raises(CheckpointError, match=f"is quantized already: .* made of: {saved}"):
        quantize_checkpoint(tmp_path / "small", tmp_path / "smaller", "rtn", rtn)
    with pytest.raises(CheckpointError, match="exists; a checkpoint is never overwritten"):
        quantize_checkpoint(saved, tmp_path / "small", "rtn", rtn)
    small = checkpoint.load(tmp_path / "small").params
    with pytest.raises(ValueError, match="layer 0 attention/key/kernel is quantized already"):
        quantize(InMemory(CONFIG, small), rtn)
    sick = map_with_path(
        lambda path, leaf: leaf.at[1, 2, 3].set(jnp.nan) if "up/kernel" in path else leaf,
        params_of(),
    )
    with pytest.raises(
        ValueError, match="layer 1 feed_forward/up/kernel holds 1 values that are not finite"
    ):
        quantize(InMemory(CONFIG, sick), rtn)
    folder = checkpoint.save(tmp_path / "sick", CONFIG, sick, ByteTokenizer().files())
    with pytest.raises(ValueError, match="not finite"):
        quantize_checkpoint(folder, tmp_path / "cured", "rtn", rtn)
    assert not list(tmp_path.glob("cured*"))


def test_layers_that_are_stored_otherwise_are_stacked_apart_and_a_run_goes_on(saved, tmp_path):
    params = map_with_path(  # rows that stand out, in the last layer
        lambda path, leaf: leaf.at[1, :2].multiply(30.0) if "up/kernel" in path else leaf,
        params_of(),
    )
    folder = checkpoint.save(tmp_path / "planted", CONFIG, params, ByteTokenizer().files())
    method = METHODS["finequant"](min_group=8, alpha=1.5, by_layer=True)
    quantize_checkpoint(folder, tmp_path / "small", "finequant", method)
    found = checkpoint.load(tmp_path / "small")
    assert list(found.params["layers"]) == ["000-001", "001-002"]
    groups = {
        path: leaf.group for path, leaf in flatten(found.params).items() if "up/kernel" in path
    }
    assert list(groups.values()) == [32, 8]
    rows = [json.loads(line) for line in found.files["quantization.jsonl"].splitlines()]
    reported = {row["layer"]: row["bits"] for row in rows if "up/kernel" in row["path"]}
    kernels = [leaf for path, leaf in flatten(found.params).items() if "up/kernel" in path]
    assert list(reported.values()) == [bits_per_weight(kernel) for kernel in kernels]
    shared, _ = quantize(InMemory(CONFIG, params), METHODS["finequant"](min_group=8, alpha=1.5))
    assert list(shared["layers"]) == ["000-002"]


def test_what_a_site_reads_is_prepared_once_for_all_that_read_it():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watched(METHODS["gptq"]):
        def prepare(self, stats):
            jax.debug.callback(lambda count: seen.append(int(count)), stats.count)
            return super().prepare(stats)

    config = dataclasses.replace(CONFIG, num_layers=1)
    model = InMemory(config, params_of(config))
    for order in ("sequential", "all"):
        options = Options(order=order)
        found, _ = quantize(model, Watched(group=16), TOKENS, options=options)
        expected, _ = quantize(model, METHODS["gptq"](group=16), TOKENS, options=options)
        equal(found, expected)
    jax.effects_barrier()
    assert seen == [TOKENS.size] * 2 * 4  # query, key and value; output; gate and up; down


@pytest.mark.slow
def test_the_command_prints_help_and_a_summary(saved):
    command = [sys.executable, "-m", "surgery"]
    root = Path(__file__).parent.parent
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=root)
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in METHODS)
    out = saved.parent / "out"
    arguments = ["nf4", f"--checkpoint={saved}", f"--out={out}", "--block=32"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "nominal bits 4" in done.stdout
    assert "layer 2/2" in done.stderr


def test_methods_share_the_statistics_of_one_pass(saved, tmp_path, monkeypatch):
    """The same bits with statistics that another method kept, and the text is not run again."""
    text, folder = text_of(saved), tmp_path / "statistics"
    sharing = dataclasses.replace(text, save_statistics=str(folder))
    awq, smooth = METHODS["awq"](group=16), METHODS["smoothquant"]()
    quantize_checkpoint(saved, tmp_path / "first", "awq", awq, text=sharing)
    assert {file.name for file in (folder / "001").iterdir()} == {
        "attention.query+key+value.npz",
        "attention.output.npz",
        "feed_forward.up+gate.npz",
        "feed_forward.down.npz",
    }

    def never(*_):
        raise AssertionError("the calibration text was run again")

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "accumulate", never)
        quantize_checkpoint(saved, tmp_path / "shared", "smoothquant", smooth, text=sharing)
    quantize_checkpoint(saved, tmp_path / "alone", "smoothquant", smooth, text=text)
    equal(*(checkpoint.load(tmp_path / name).params for name in ("shared", "alone")))
    other = dataclasses.replace(sharing, seed=1)
    with pytest.raises(ValueError, match=r"holds statistics with calibration = .*another folder"):
        quantize_checkpoint(saved, tmp_path / "other", "awq", awq, text=other)
    with pytest.raises(ValueError, match="GPTQ does not learn from the unquantized model"):
        quantize_checkpoint(
            saved, tmp_path / "gptq", "gptq", METHODS["gptq"](group=16), text=sharing
        )
    (folder / "001").rename(tmp_path / "lost")
    quantize_checkpoint(saved, tmp_path / "second", "awq", awq, text=sharing)
    equal(*(checkpoint.load(tmp_path / name).params for name in ("first", "second")))
    assert (folder / "001").is_dir()
