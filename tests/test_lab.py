"""The model that comes with the project is what its provenance says; a run becomes such a one."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import ByteTokenizer, load_tokenizer, open_source
from model import ModelConfig, checkpoint, generate, init
from surgery import Folder, consecutive, perplexity
from surgery.__main__ import main
from weights import flatten

ROOT = Path(__file__).parents[1]
LAB = ROOT / "assets" / "lab"
HELD_OUT = ROOT.parent / "shared" / "data" / "fiction.valid.jsonl.gz"
CONFIG = ModelConfig(vocab_size=264, d_model=16, num_layers=2, num_heads=2, d_ff=16, max_length=16)


def test_cast_leaves_the_model_alone_in_the_type_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    params = init(CONFIG, jax.random.key(0))
    checkpoint.save("run", CONFIG, params, ByteTokenizer().files())
    Path("text.txt").write_text("the cat sat on the mat. " * 20)
    asked = ["cast", "--checkpoint=run", "--out=small", "--evaluate=text.txt"]
    assert main([*asked, "--evaluate-windows=3"]) == 0
    read = checkpoint.load("small")
    for path, leaf in flatten(read.params).items():
        assert leaf.dtype == jnp.bfloat16, path
        np.testing.assert_array_equal(leaf, flatten(params)[path].astype(jnp.bfloat16))
    noted = read.provenance["evaluation"]
    assert (noted["source"], noted["n_sequences"], noted["length"]) == ("text.txt", 3, 16)
    tokens = consecutive("text.txt", ByteTokenizer(), 16, 3).tokens
    assert perplexity(Folder("small"), tokens) == pytest.approx(noted["perplexity"], rel=1e-6)
    assert f"perplexity {noted['perplexity']:.4f} on text.txt" in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(dict(read.provenance))
    assert main(asked) == 2
    assert "small exists" in capsys.readouterr().err


@pytest.mark.skipif(not LAB.exists(), reason="assets/lab is not there")
def test_the_laboratory_model_writes_text_and_loses_what_its_provenance_states():
    read = checkpoint.load(LAB)
    leaves = flatten(read.params).values()
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    assert sum(file.stat().st_size for file in LAB.rglob("*") if file.is_file()) <= 16_000_000
    tokenizer = load_tokenizer(read.files)
    prompt = tokenizer.encode(["She looked out of the"])[0][None]
    made = generate(read.params, prompt, read.config, max_new_tokens=8).lists()[0]
    assert len(tokenizer.decode(np.asarray(made)).split()) > 2
    noted = read.provenance["evaluation"]
    if not HELD_OUT.exists():
        pytest.skip("no text to measure with: ../shared/data is not there")
    found = consecutive(
        open_source(str(HELD_OUT)), tokenizer, noted["length"], noted["n_sequences"]
    )
    assert found.record["sha256"] == noted["sha256"]
    assert perplexity(Folder(LAB), found.tokens) == pytest.approx(noted["perplexity"], rel=1e-3)
