"""`generation_config.json`: what it says is applied or named, never dropped silently."""

from __future__ import annotations

import json

import pytest

from model.generation_config import GenerationConfig, read_generation_config
from model.sampling import GREEDY, Sampling

LLAMA_31 = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.42.3",
}


def read(values: dict, config: dict | None = None, **options) -> GenerationConfig:
    files = {"generation_config.json": json.dumps(values).encode()}
    files |= {"config.json": json.dumps(config).encode()} if config else {}
    return read_generation_config(files, **options)


def test_a_published_file_is_read_with_the_top_k_that_transformers_adds():
    found = read(LLAMA_31)
    assert found.sampling == Sampling(temperature=0.6, top_k=50, top_p=0.9)
    assert found.stop_tokens == (128001, 128008, 128009)
    assert (found.bos_token, found.pad_token, found.not_applied) == (128000, None, {})
    qwen = {"do_sample": True, "top_k": 20, "repetition_penalty": 1.05, "pad_token_id": 5}
    assert read(qwen).sampling == Sampling(1.0, 20, 1.0)
    assert read(qwen).not_applied == {"repetition_penalty": 1.05}
    assert read({"do_sample": True, "top_k": 0}).sampling == Sampling(1.0, None, 1.0)


def test_without_drawing_it_is_greedy_and_only_what_changes_that_is_not_applied():
    assert read({"temperature": 0.6, "top_p": 0.9, "min_p": 0.1}) == GenerationConfig()
    assert read({}).sampling == GREEDY
    values = {"num_beams": 4, "repetition_penalty": 1.0, "new_thing": 1, "suppress_tokens": None}
    assert read(values).not_applied == {"num_beams": 4, "new_thing": 1}
    assert read({"do_sample": True, "min_p": 0.1}).not_applied == {"min_p": 0.1}


def test_the_end_is_looked_for_in_order():
    assert read({"eos_token_id": 7}, {"eos_token_id": 8}, eos=9).stop_tokens == (7,)
    assert read({}, {"eos_token_id": [8, 8, 3]}, eos=9).stop_tokens == (8, 3)
    assert read({}, {"vocab_size": 5}, eos=9).stop_tokens == (9,)
    assert read_generation_config({}).stop_tokens == ()
    assert read({"max_new_tokens": 5, "max_length": 9}).max_new_tokens == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": "</s>"}, r"eos_token_id is '</s>'; it must be an id or ids"),
        ({"do_sample": 1}, "do_sample is 1; it must be bool or null"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'; it must be float"),
        ({"do_sample": True, "top_p": 2.0}, r"generation_config\.json: sampling\.top_p is 2\.0"),
        ([], "holds list, not an object"),
    ],
)
def test_wrong_fields_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        read(values)
    with pytest.raises(ValueError, match=r"generation_config\.json: not JSON"):
        read_generation_config({"generation_config.json": b"{"})


@pytest.mark.interop
def test_every_field_that_transformers_writes_is_known():
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig._get_default_generation_params()
    assert read({**defaults, "do_sample": True}).not_applied == {}
