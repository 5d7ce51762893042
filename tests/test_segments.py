"""Layers that are stored unlike, formats or bits that differ: stacked apart, one model."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, write_text

from data import ByteTokenizer
from model import ModelConfig, Runtime, forward, generate, init
from model.checkpoint import load, save
from model.checkpoint_folder import MODEL, CheckpointError, commit, read_json, write_json
from model.families import export_checkpoint, import_checkpoint
from model.segments import segments_of
from sharding import MeshConfig, make_layout, make_mesh
from surgery import Folder, InMemory, Work, perplexity
from surgery.adapt import LoRA, adapters, attach, load_peft, save_peft, without_adapters
from training import train_language_model
from weights import dequantize, flatten, from_flat, grouped, int8, map_with_path

CONFIG = ModelConfig(
    vocab_size=48, d_model=64, num_layers=3, num_heads=4, kv_heads=2, d_ff=128, max_length=32
)
TOKENS = jnp.arange(32, dtype=jnp.int32).reshape(4, 8) % 48
GROUPED = jax.jit(grouped.quantize, static_argnames=("bits", "group"))
INT8 = jax.jit(int8.quantize)


class Mixed(NamedTuple):
    params: Any
    dense: Any


def quantized(config, *formats):
    """A model whose layers have kernels in these formats, and the same in plain arrays."""
    source, work = InMemory(config, init(config, jax.random.key(0))), Work(config)
    for layer, quantize in enumerate(formats):
        found = flatten(source.layer(layer))
        for path, leaf in found.items():
            if path.endswith("/kernel"):
                found[path] = quantize(4 * leaf)
        work.put(layer, from_flat(found), [])
    params = jax.tree.map(jnp.asarray, {**source.outer(), "layers": work.layers()})
    stacks = params["layers"].values()
    plain = [map_with_path(lambda _, leaf: dequantize(leaf), stack) for stack in stacks]
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *plain)
    return params, {**params, "layers": {f"000-{config.num_layers:03d}": whole}}


@pytest.fixture(scope="module")
def mixed():
    """Two layers in groups and one of 8 bits, and the same in plain arrays."""
    in_groups = functools.partial(GROUPED, bits=8, group=32)
    return Mixed(*quantized(CONFIG, in_groups, in_groups, INT8))


def logits(params, runtime=None, config=CONFIG):
    run = jax.jit(forward, static_argnums=(2, 3))
    return np.asarray(run(params, TOKENS, config, runtime or Runtime())[0])


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_layers_of_another_format_run_and_generate_as_the_arrays_they_stand_for(mixed):
    assert list(mixed.params["layers"]) == ["000-002", "002-003"]
    np.testing.assert_allclose(logits(mixed.params), logits(mixed.dense), rtol=1e-4, atol=1e-5)
    made, expected = (
        generate(params, [[1, 2, 3]], CONFIG, max_new_tokens=5).lists()
        for params in (mixed.params, mixed.dense)
    )
    assert made == expected


def test_they_are_saved_and_read_whole_on_a_mesh_and_layer_by_layer(mixed, tmp_path):
    folder = save(tmp_path / "mixed", CONFIG, mixed.params)
    equal(load(folder).params, mixed.params)
    layout = make_layout(make_mesh(MeshConfig(data=4, tensor=2)))
    split = load(folder, layout).params
    equal(split, mixed.params)
    found = logits(split, Runtime(layout=layout))
    np.testing.assert_allclose(found, logits(mixed.dense), rtol=1e-4, atol=1e-5)
    rows = np.asarray(TOKENS)
    expected = perplexity(InMemory(CONFIG, mixed.dense), rows)
    assert perplexity(Folder(folder), rows) == pytest.approx(expected, rel=1e-5)


def test_they_are_exported_layer_by_layer(mixed, tmp_path):
    folder = save(tmp_path / "mixed", CONFIG, mixed.params)
    there = export_checkpoint(folder, tmp_path / "exported", family="llama")
    again = import_checkpoint(there).params
    assert jax.tree.structure(again) == jax.tree.structure(mixed.dense)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), again, mixed.dense)


def test_adapters_stand_beside_them_and_travel_alone(mixed, tmp_path):
    adapted = map_with_path(
        lambda _, leaf: dataclasses.replace(leaf, b=leaf.b + 0.1) if hasattr(leaf, "b") else leaf,
        attach(mixed.params, LoRA(rank=2, targets="query|down")),
    )
    save_peft(tmp_path / "adapter", CONFIG, adapted)
    equal(load_peft(tmp_path / "adapter", CONFIG, mixed.params), adapted)
    over_dense = load_peft(tmp_path / "adapter", CONFIG, mixed.dense)
    np.testing.assert_allclose(logits(over_dense), logits(adapted), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_they_are_trained_with_adapters(tmp_path):
    config = tiny_config(write_text(tmp_path))
    assert config.model is not None
    bits = (functools.partial(GROUPED, bits=bits, group=16) for bits in (4, 3))
    start = attach(quantized(config.model, *bits)[0], LoRA(rank=4))
    save(tmp_path / "start", config.model, start, ByteTokenizer().files())
    changes = {"start_from": str(tmp_path / "start"), "trainable": ".*/(a|b)", "steps": 6}
    tuned = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
    train_language_model(tuned, tmp_path / "run", stop_at=3, quiet=True)
    result = train_language_model(tuned, tmp_path / "run", quiet=True)
    trained = load(result.workdir).params
    assert list(trained["layers"]) == ["000-001", "001-002"]
    equal(without_adapters(trained), without_adapters(start))
    assert all(np.abs(part["b"]).max() > 0 for part in adapters(trained).values())


def test_stacks_that_do_not_hold_the_layers_once_are_refused_by_name(mixed, tmp_path):
    unlike = dataclasses.replace(CONFIG, layer_overrides=((1, "sliding_window", 4),))
    each = ["000-001", "001-002", "002-003"]
    assert [s.name for s in segments_of({"layers": dict.fromkeys(each)}, unlike)] == each
    for names in (
        ["000-002", "002-003"],
        ["000-001", "002-003"],
        ["0-1", *each[1:]],
        [*each, "last"],
    ):
        with pytest.raises(ValueError, match=f"stacked as {', '.join(names)}; this config has"):
            segments_of({"layers": dict.fromkeys(names)}, unlike)
    folder = save(tmp_path / "mixed", CONFIG, mixed.params)
    description = read_json(folder / MODEL)
    description["config"]["num_layers"] = 4
    write_json(folder / MODEL, description)
    (folder / "commit.json").unlink()
    commit(folder.rename(tmp_path / "mixed.partial"))
    message = "mixed: its layers are stacked as 000-002, 002-003; this config has layers 0 to 3"
    with pytest.raises(CheckpointError, match=message):
        load(folder)
