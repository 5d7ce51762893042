"""A Hugging Face checkpoint read straight onto a mesh, and its faults."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import ModelConfig, Runtime, abstract, forward, init
from model.checkpoint import Checkpoint, load
from model.families import (
    FAMILIES,
    FamilyError,
    config_from_hf,
    export_checkpoint,
    import_checkpoint,
)
from model.families.plan import their_shapes
from sharding import MeshConfig, make_layout, make_mesh
from weights import flatten

CONFIG = ModelConfig(
    vocab_size=48, d_model=32, num_layers=3, num_heads=4, kv_heads=2, d_ff=64, max_length=64
)
TOKENS = np.random.default_rng(0).integers(0, 48, (8, 12)).astype(np.int32)


def folder_of(config, path, dtype=jnp.float32, **options):
    """A Hugging Face folder of a random model, and its params."""
    params = init(config, jax.random.key(1), dtype)
    found = Checkpoint(config, params, {}, {}, path)
    export_checkpoint(found, path, **options)
    return params


def layout_of(**sizes):
    return make_layout(make_mesh(MeshConfig(data=1, **sizes)))


def equal(found, wanted):
    wanted = flatten(wanted)
    assert flatten(found).keys() == wanted.keys()
    for path, value in flatten(found).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(wanted[path]), err_msg=path)


def test_export_and_import_on_one_device_give_back_every_array(tmp_path):
    params = folder_of(CONFIG, tmp_path)
    found = import_checkpoint(tmp_path)
    assert found.config.resolve() == CONFIG.resolve()
    equal(found.params, params)


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"fsdp": 8}, {"tensor": 2, "fsdp": 2}])
def test_arrays_lie_in_their_shards_and_logits_do_not_change(tmp_path, sizes):
    params = folder_of(CONFIG, tmp_path)
    layout = layout_of(**{"context": 8 // int(np.prod(list(sizes.values()))), **sizes})
    found = import_checkpoint(tmp_path, layout=layout)
    equal(found.params, params)
    for path, value in flatten(found.params).items():
        if path.endswith("kernel"):
            assert (
                value.addressable_shards[0].data.size * np.prod(list(sizes.values())) == value.size
            )
    runtime = Runtime(layout=layout)
    ours = jax.jit(lambda p, t: forward(p, t, CONFIG, runtime)[0])(found.params, TOKENS)
    plain = forward(params, TOKENS, CONFIG)[0]
    np.testing.assert_allclose(ours, plain, atol=1e-4)


MIXTURE = dataclasses.replace(
    CONFIG, feed_forward="experts", num_experts=4, experts_per_token=2, qk_norm="none"
)
JETMOE = dataclasses.replace(
    MIXTURE,
    mixer="attention_experts",
    kv_heads=2,
    head_dim=8,
    expert_bias=True,
    tied_embeddings=True,
    norm_eps=1e-6,
    final_norm_eps=1e-5,
)


@pytest.mark.parametrize("config", [MIXTURE, JETMOE], ids=["mixtral", "jetmoe"])
@pytest.mark.parametrize(
    "sizes", [{"expert": 4, "tensor": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}]
)
def test_experts_lie_on_their_own_devices_and_logits_do_not_change(tmp_path, config, sizes):
    params = folder_of(config, tmp_path)
    layout = layout_of(**sizes)
    found = import_checkpoint(tmp_path, layout=layout)
    equal(found.params, params)
    gate = found.params["layers"]["000-003"]["feed_forward"]["experts"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.shape[1] == 4 // sizes["expert"]
    runtime = Runtime(layout=layout)
    ours = jax.jit(lambda p, t: forward(p, t, config, runtime)[0])(found.params, TOKENS)
    np.testing.assert_allclose(ours, forward(params, TOKENS, config)[0], atol=1e-4)
    export_checkpoint(found, tmp_path / "again")
    same = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert same == (tmp_path / "model.safetensors").read_bytes()


def test_export_from_a_mesh_writes_the_same_bytes(tmp_path):
    folder_of(CONFIG, tmp_path / "plain", jnp.bfloat16)
    found = import_checkpoint(tmp_path / "plain", layout=layout_of(fsdp=4, tensor=2))
    export_checkpoint(found, tmp_path / "mesh")
    names = ("model.safetensors", "config.json")
    for name in names:
        assert (tmp_path / "mesh" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_small_weight_files_and_a_cast(tmp_path):
    params = folder_of(CONFIG, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    found = import_checkpoint(tmp_path, dtype=jnp.bfloat16)
    equal(found.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_an_import_is_a_checkpoint_like_any_other(tmp_path):
    params = folder_of(CONFIG, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"a": 1}')
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    read = load(tmp_path / "ours", layout_of(fsdp=8))
    equal(read.params, params)
    assert read.files["tokenizer_config.json"] == b'{"a": 1}'
    assert read.provenance["method"] == "import"
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    same = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert same == (tmp_path / "theirs" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "tokenizer_config.json").read_bytes() == b'{"a": 1}'


def broken(tmp_path, change_tensors=None, **config):
    """A folder whose tensors or config.json were changed."""
    folder_of(CONFIG, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **config}))
    if change_tensors is not None:
        tensors = load_file(tmp_path / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_named_with_their_file(tmp_path):
    def change(tensors):
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.layers.1.self_attn.extra"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)

    with pytest.raises(FamilyError) as error:
        import_checkpoint(broken(tmp_path, change))
    text = str(error.value)
    assert "missing (1): model.layers.1.self_attn.k_proj.weight" in text
    assert "unexpected (1): model.layers.1.self_attn.extra [3]" in text
    assert "model.norm.weight is [31]" in text
    assert "model.safetensors" in text
    assert "[32]" in text


def test_unknown_keys_of_the_config_are_errors_unless_named(tmp_path):
    folder = broken(tmp_path, attention_twist=2, something_null=None)
    with pytest.raises(FamilyError, match="attention_twist = 2"):
        import_checkpoint(folder)
    found = import_checkpoint(folder, ignore_keys=["attention_twist"])
    assert found.provenance["ignored_keys"] == ["attention_twist"]


def test_unsupported_values_and_model_types_are_errors(tmp_path):
    with pytest.raises(FamilyError, match="hidden_act is 'mish'"):
        import_checkpoint(broken(tmp_path / "a", hidden_act="mish"))
    with pytest.raises(FamilyError, match=r"'lama' is no family.*nearest: llama"):
        import_checkpoint(broken(tmp_path / "b", model_type="lama"))
    with pytest.raises(FamilyError, match=r"rope_type 'yarm'.*yarn"):
        import_checkpoint(broken(tmp_path / "c", rope_scaling={"rope_type": "yarm", "factor": 2.0}))


def test_a_tied_head_must_be_the_embedding(tmp_path):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    found = import_checkpoint(broken(tmp_path / "same", tie, tie_word_embeddings=True))
    assert "head" not in found.params
    with pytest.raises(FamilyError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        import_checkpoint(broken(tmp_path / "other", tie_word_embeddings=True))

    def without(tensors):
        del tensors["lm_head.weight"]

    with pytest.raises(FamilyError, match=r"lm_head\.weight.*tie_word_embeddings is False"):
        import_checkpoint(broken(tmp_path / "none", without))


def test_names_without_the_base_prefix_and_buffers_are_read(tmp_path):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    import_checkpoint(broken(tmp_path, strip))


def test_a_model_that_a_family_cannot_say_is_refused_with_the_field(tmp_path):
    config = dataclasses.replace(CONFIG, logit_soft_cap=3.0)
    found = Checkpoint(config, init(config, jax.random.key(0)), {}, {}, tmp_path)
    with pytest.raises(FamilyError, match=r"model\.logit_soft_cap is 3\.0"):
        export_checkpoint(found, tmp_path / "out", family="llama")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_of_a_packed_tensor_are_a_permutation(name):
    """Every number of a tensor of theirs is exactly one number of ours."""
    family = FAMILIES[name]
    config = config_from_hf(family, {"model_type": family.model_types[0]})
    theirs = sum(int(np.prod(shape)) for shape in their_shapes(family, config).values())
    ours = sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))
    assert theirs == ours
