"""Import, check, train further and export from the command line, as a user would."""

import json

import jax
import numpy as np
import pytest
from test_families_mesh import CONFIG, TOKENS, folder_of

from data import load_tokenizer
from model import forward
from model.__main__ import main
from model.checkpoint import load
from training import load_config, run_config
from training.language_model import train_language_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A Hugging Face folder with a tokenizer whose ids fit the model."""
    folder = tmp_path_factory.mktemp("theirs")
    folder_of(CONFIG, folder)
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*sorted(set(TEXT.split())), "<eos>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "chat_template": "hi"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    return folder


def test_import_train_further_and_export(theirs, tmp_path, capsys):
    ours = tmp_path / "ours"
    assert (
        main(["import", f"--from={theirs}", f"--to={ours}", "--mesh.fsdp=8", "--mesh.data=1"]) == 0
    )
    assert "llama, 30,944 parameters" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    config = load_config(f"configs/continue_from.py:{ours}")
    config.data.path, config.data.length, config.data.batch_size = str(text), 16, 8
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.validation_fraction = 0.0
    config.train.steps = 2
    result = train_language_model(run_config(config), tmp_path / "run", quiet=True)
    trained = load(tmp_path / "run")
    assert trained.files["generation_config.json"] == b'{"eos_token_id": 9}'
    assert json.loads(trained.files["tokenizer_config.json"])["chat_template"] == "hi"
    assert main(["export", f"--checkpoint={tmp_path / 'run'}", f"--to={tmp_path / 'out'}"]) == 0
    assert main(["import", f"--from={tmp_path / 'out'}", f"--to={tmp_path / 'again'}"]) == 0
    again = load(tmp_path / "again")
    expected = forward(result.state.params, TOKENS, CONFIG)[0]
    np.testing.assert_allclose(forward(again.params, TOKENS, again.config)[0], expected, atol=1e-5)
    assert load_tokenizer(again.files).eos == load_tokenizer(theirs).eos


def test_check_reads_no_weights_and_names_what_is_there(theirs, capsys):
    assert main(["check", str(theirs)]) == 0
    out = capsys.readouterr().out
    assert "llama, 30,944 parameters in 30 tensors (float32)" in out
    assert "  kv_heads = 2" in out


def test_wrong_input_is_one_line_that_names_the_file(theirs, tmp_path, capsys):
    assert main(["import", f"--from={tmp_path}", f"--to={tmp_path / 'x'}"]) == 2
    assert "config.json" in capsys.readouterr().err
    (tmp_path / "here").mkdir()
    assert main(["import", f"--from={theirs}", f"--to={tmp_path / 'here'}"]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert main(["export", f"--checkpoint={tmp_path / 'none'}", f"--to={tmp_path / 'y'}"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_scratch_model_is_exported_with_its_tokenizers_ids(theirs, tmp_path):
    from model import init
    from model.checkpoint import Checkpoint
    from model.families import export_checkpoint

    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: (theirs / name).read_bytes() for name in names}
    found = Checkpoint(CONFIG, init(CONFIG, jax.random.key(0)), files, {}, tmp_path)
    export_checkpoint(found, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["eos_token_id"] == load_tokenizer(theirs).eos
    assert values["bos_token_id"] is None
