"""A model on disk: the same numbers on any mesh, and no folder that is not whole is ever taken for
one.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from save_worker import equal

import weights.serial
from model import checkpoint_folder as folders
from model.checkpoint import load, save
from model.checkpoint_folder import CheckpointError
from model.config import ModelConfig, RopeScaling
from model.parameters import init
from sharding import MeshConfig, make_layout, make_mesh
from weights import flatten, from_flat, is_weight

SMALL = ModelConfig(
    vocab_size=64,
    d_model=16,
    num_layers=3,
    num_heads=4,
    kv_heads=2,
    d_ff=32,
    rope_scaling=RopeScaling(
        kind="longrope", factor=2.0, short_factor=(1.0, 1.5), long_factor=(2.0, 3.0)
    ),
    layer_overrides=((1, "sliding_window", 8),),
)
PARAMS = init(SMALL, jax.random.key(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A weight format for the tests: int8 codes and a scale."""

    codes: jax.Array
    scale: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})

    def matmul(self, x, rng=None):
        return x @ self.dequantize(x.dtype)

    def dequantize(self, dtype=jnp.float32):
        return (self.codes * self.scale).astype(dtype)

    def nbytes(self):
        return self.codes.nbytes + self.scale.nbytes

    def prepare(self, backend):
        return self

    def specs(self, spec):
        return Scaled(spec, jax.sharding.PartitionSpec(), self.bits)


def test_a_model_comes_back_with_its_config_files_and_provenance(tmp_path):
    files = {"tokenizer.json": b'{"model": 1}', "chat_template.jinja": "{{ messages }}"}
    folder = save(tmp_path / "model", SMALL, PARAMS, files, {"method": "test", "parents": []})
    found = load(folder)
    assert found.config == SMALL
    assert found.files == {
        "tokenizer.json": b'{"model": 1}',
        "chat_template.jinja": b"{{ messages }}",
    }
    assert found.provenance == {"method": "test", "parents": []}
    equal(found.params, PARAMS)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=8), MeshConfig(fsdp=4, tensor=2, data=1), MeshConfig(data=-1, tensor=2)],
)
def test_a_model_saved_on_one_mesh_loads_onto_another_in_shards(tmp_path, mesh):
    saved_on = make_layout(make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2]))
    save(tmp_path / "first", SMALL, PARAMS)
    save(tmp_path / "second", SMALL, load(tmp_path / "first", saved_on).params)
    layout = make_layout(make_mesh(mesh))
    found = load(tmp_path / "second", layout)
    equal(found.params, PARAMS)
    up = flatten(found.params)["layers/000-001/feed_forward/up/kernel"]
    assert up.sharding.mesh == layout.mesh
    assert up.addressable_shards[0].data.nbytes * mesh.tensor * mesh.fsdp == up.nbytes


def test_dtype_casts_dense_floats_and_leaves_a_format_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(weights.serial.FORMATS, "scaled", Scaled)
    flat = flatten(PARAMS)
    path = "layers/000-001/attention/query/kernel"
    flat[path] = Scaled((flat[path] * 100).astype(jnp.int8), jnp.full((1, 1, 16), 0.01), 8)
    params = from_flat(flat)
    save(tmp_path / "mixed", SMALL, params)
    layout = make_layout(make_mesh(MeshConfig(data=4, tensor=2)))
    equal(load(tmp_path / "mixed", layout).params, params)
    cast = flatten(load(tmp_path / "mixed", dtype=jnp.bfloat16).params)
    assert cast[path].bits == 8
    assert cast[path].codes.dtype == jnp.int8
    assert cast[path].scale.dtype == jnp.float32
    assert {leaf.dtype for leaf in cast.values() if not isinstance(leaf, Scaled)} == {
        jnp.dtype("bfloat16")
    }
    assert is_weight(cast[path])


def test_reading_for_inference_never_opens_the_optimizer(tmp_path):
    folder = save(tmp_path / "model", SMALL, PARAMS)
    (folder / "train_state").mkdir()
    (folder / "train_state" / "manifest.ocdbt").write_bytes(b"not an array")
    equal(load(folder).params, PARAMS)


def test_arrays_of_another_architecture_are_named_by_path(tmp_path):
    folder = save(tmp_path / "model", SMALL, PARAMS)
    model = folders.read_json(folder / "model.json")
    model["config"]["d_ff"] = 48
    folders.write_json(folder / "model.json", model)
    recommit(folder)
    with pytest.raises(
        CheckpointError, match=r"feed_forward/down/kernel is \[1, 32, 16\], wanted \[1, 48, 16\]"
    ):
        load(folder)
    model["config"]["d_ff"], model["config"]["qk_norm"] = 32, "head"
    folders.write_json(folder / "model.json", model)
    recommit(folder)
    with pytest.raises(
        CheckpointError, match=r"missing in it: layers/000-001/attention/key_norm/scale"
    ):
        load(folder)


def test_an_unknown_field_in_model_json_names_the_nearest(tmp_path):
    folder = save(tmp_path / "model", SMALL, PARAMS)
    model = folders.read_json(folder / "model.json")
    model["config"]["kv_head"] = 2
    folders.write_json(folder / "model.json", model)
    recommit(folder)
    with pytest.raises(
        CheckpointError, match=r"model.json: config: unknown field 'kv_head'; nearest: kv_heads"
    ):
        load(folder)


def recommit(folder: Path) -> None:
    (folder / "commit.json").unlink()
    folders.commit(folder.rename(folder.with_name(folder.name + ".partial")))


def damage(folder: Path, how: str) -> str:
    largest = max((folder / "params").rglob("*"), key=lambda path: path.stat().st_size)
    if how == "no marker":
        (folder / "commit.json").unlink()
        return "half-written"
    if how == "truncated":
        largest.write_bytes(largest.read_bytes()[:-1])
        return f"{largest.name} has .* bytes"
    if how == "missing":
        largest.unlink()
        return f"{largest.name} is missing"
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return f"content of .*{largest.name} does not match"


@pytest.mark.parametrize("how", ["no marker", "truncated", "missing", "one bit flipped"])
def test_a_damaged_checkpoint_is_passed_over_by_name_and_refused_when_asked_for(
    tmp_path, caplog, how
):
    for step in (10, 20):
        save(tmp_path / "run" / "checkpoints" / f"{step:08d}", SMALL, PARAMS)
    newest = tmp_path / "run" / "checkpoints" / "00000020"
    text = damage(newest, how)
    with caplog.at_level(logging.WARNING):
        for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
            assert load(folder).folder.name == "00000010"
    assert re.search(rf"skipped checkpoint {newest}: .*{text}", caplog.text)
    with pytest.raises(CheckpointError, match=f"{newest} cannot be used: .*{text}"):
        load(newest)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"neither a run .* nor a checkpoint"):
        load(tmp_path)


def test_saving_never_overwrites_and_refuses_files_that_would_collide(tmp_path):
    folder = save(tmp_path / "model", SMALL, PARAMS)
    with pytest.raises(CheckpointError, match="never overwritten"):
        save(folder, SMALL, PARAMS)
    for name in ("model.json", "params", "../outside"):
        with pytest.raises(CheckpointError, match="cannot stand in a checkpoint"):
            save(tmp_path / "other", SMALL, PARAMS, {name: b""})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
