"""Quantized Hugging Face folders: what NumPy packs is read, and what is written comes back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import ModelConfig, Runtime, forward, init
from model.__main__ import main
from model.checkpoint import Checkpoint, load
from model.families import FamilyError, export_checkpoint, import_checkpoint
from model.families.quantized import split_config
from sharding import MeshConfig, make_layout, make_mesh
from weights import (
    Grouped,
    Int8,
    Lut,
    Permuted,
    dequantize,
    flatten,
    float4,
    from_flat,
    grouped,
    int8,
    is_format,
    normal_float,
    stack,
    unstack,
)
from weights.interop.columns import alike, join_columns, take_columns

CONFIG = ModelConfig(
    vocab_size=40,
    d_model=128,
    num_layers=2,
    num_heads=4,
    kv_heads=2,
    head_dim=64,
    d_ff=256,
    max_length=64,
)
TOKENS = np.random.default_rng(0).integers(0, 40, (4, 9)).astype(np.int32)
GROUP = 32
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = np.asarray(normal_float.TABLE, np.float32)


def words(codes, axis, order=IN_ORDER):
    """Codes of 4 bits, eight a word along an axis, nibble i that of place `order[i]`."""
    codes = np.moveaxis(codes, axis, 0).astype(np.int64)
    found = np.sum([codes[place::8] << (4 * i) for i, place in enumerate(order)], axis=0)
    return np.moveaxis(found.astype(np.uint32).view(np.int32), 0, axis).copy()


def gptq(rng, rows, columns):
    """A layer in act-order with zeros of its own, version 1, and what it stands for `[K, N]`."""
    codes, scales, zeros = random_layer(rng, rows, columns)
    index = rng.permutation(np.arange(rows) // GROUP).astype(np.int32)
    arrays = {
        "qweight": words(codes, 0),
        "qzeros": words(zeros - 1, 1),
        "scales": scales,
        "g_idx": index,
        "bias": np.zeros(columns, np.float16),
    }
    return arrays, scales[index].astype(np.float64) * (codes - zeros[index])


def awq(rng, rows, columns):
    codes, scales, zeros = random_layer(rng, rows, columns)
    arrays = {
        "qweight": words(codes, 1, AWQ_COLUMNS),
        "qzeros": words(zeros, 1, AWQ_COLUMNS),
        "scales": scales,
    }
    index = np.arange(rows) // GROUP
    return arrays, scales[index].astype(np.float64) * (codes - zeros[index])


def random_layer(rng, rows, columns):
    codes = rng.integers(0, 16, (rows, columns))
    zeros = rng.integers(6, 11, (rows // GROUP, columns))
    return codes, rng.uniform(0.002, 0.01, zeros.shape).astype(np.float16), zeros


def nf4(rng, rows, columns):
    """Blocks of 64 along the inputs; scales coded again in blocks of 256 of all."""
    codes = rng.integers(0, 16, columns * rows)
    again = rng.integers(0, 256, columns * rows // 64)
    nested_map = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    nested = rng.uniform(0.001, 0.01, -(-len(again) // 256)).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [columns, rows]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03125}
    arrays = {
        "weight": (codes[::2] * 16 + codes[1::2]).astype(np.uint8)[:, None],
        "weight.absmax": again.astype(np.uint8),
        "weight.quant_map": NF4,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": nested_map,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), "u1"),
    }
    spread = np.repeat(nested, 256)[: len(again)].astype(np.float64)
    scales = spread * nested_map[again] + 0.03125
    return arrays, (NF4[codes].astype(np.float64) * np.repeat(scales, 64)).reshape(columns, rows).T


LAYERS = {
    "gptq": (
        gptq,
        {"bits": 4, "group_size": GROUP, "desc_act": True, "sym": False, "damp_percent": 0.01},
    ),
    "awq": (awq, {"bits": 4, "group_size": GROUP, "version": "GEMM", "zero_point": True}),
    "bitsandbytes": (nf4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
}


def folders(path, family, method, config=CONFIG):
    """A quantized folder made by NumPy, and the dense one it stands for."""
    params = init(config, jax.random.key(1))
    dense, coded = path / "dense", path / method
    export_checkpoint(Checkpoint(config, params, {}, {}, path), dense, family=family)
    make, settings = LAYERS[method]
    tensors, packed, rng = load_file(dense / "model.safetensors"), {}, np.random.default_rng(7)
    for name in sorted(tensors):
        if "proj" not in name:
            packed[name] = tensors[name]
            continue
        arrays, value = make(rng, *tensors[name].shape[::-1])
        tensors[name] = np.ascontiguousarray(value.T.astype(np.float32))
        packed |= {name.removesuffix("weight") + last: array for last, array in arrays.items()}
    save_file(tensors, dense / "model.safetensors")
    coded.mkdir()
    save_file(packed, coded / "model.safetensors")
    values = json.loads((dense / "config.json").read_text())
    values["quantization_config"] = {"quant_method": method, **settings}
    (coded / "config.json").write_text(json.dumps(values))
    return coded, dense


def logits(params, config=CONFIG, runtime=None):
    runtime = runtime or Runtime()
    return np.asarray(jax.jit(lambda p, t: forward(p, t, config, runtime)[0])(params, TOKENS))


def kernels(params):
    return {path: leaf for path, leaf in flatten(params).items() if is_format(leaf)}


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("gptq", "llama"),
        ("awq", "phi3"),
        ("bitsandbytes", "phi3"),
        pytest.param("gptq", "phi3", marks=pytest.mark.slow),
        pytest.param("awq", "llama", marks=pytest.mark.slow),
        pytest.param("bitsandbytes", "llama", marks=pytest.mark.slow),
    ],
)
def test_what_numpy_packed_is_read_and_written_again(method, family, tmp_path):
    coded, dense = folders(tmp_path, family, method)
    found, plain = import_checkpoint(coded), import_checkpoint(dense)
    expected = {"gptq": Permuted, "awq": Grouped, "bitsandbytes": Lut}[method]
    assert {type(leaf) for leaf in kernels(found.params).values()} == {expected}
    assert len(kernels(found.params)) == 7
    np.testing.assert_allclose(logits(found.params), logits(plain.params), atol=1e-5, rtol=1e-5)
    export_checkpoint(found, tmp_path / "again", family=family, quantized=method)
    written, given = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "again", coded)
    )
    given = {name: array for name, array in given.items() if not name.endswith(".bias")}
    assert written.keys() == given.keys()
    for name, array in given.items():
        if "quant_state" in name:
            assert json.loads(bytes(written[name])) == json.loads(bytes(array))
            continue
        assert written[name].dtype == array.dtype, name
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    again = import_checkpoint(tmp_path / "again").params
    jax.tree.map(np.testing.assert_array_equal, again, found.params)
    export_checkpoint(found, tmp_path / "as_dense", family=family)
    assert "quantization_config" not in json.loads(
        (tmp_path / "as_dense" / "config.json").read_text()
    )
    import_checkpoint(tmp_path / "as_dense")


SMALL = ModelConfig(
    vocab_size=16, d_model=64, num_layers=2, num_heads=1, kv_heads=1, d_ff=64, max_length=32
)
"""All its kernels are 64 x 64."""


def in_formats(make, path, config=SMALL):
    """A model of ours whose layers' kernels are formats."""
    flat = flatten(init(config, jax.random.key(3)))
    for name, leaf in flat.items():
        if name.startswith("layers") and name.endswith("kernel"):
            flat[name] = stack([make(matrix) for matrix in leaf])
    return Checkpoint(config, from_flat(flat), {}, {}, path)


def llm_int8(w):
    return int8.quantize(w, threshold=5.0)


@pytest.mark.parametrize(
    ("method", "make"), [("bitsandbytes", llm_int8), ("bitsandbytes", float4.quantize)]
)
def test_a_checkpoint_in_formats_is_exported_and_imported(method, make, tmp_path):
    found = in_formats(make, tmp_path)
    export_checkpoint(found, tmp_path / "theirs", quantized=method)
    theirs, ours = str(tmp_path / "theirs"), str(tmp_path / "ours")
    assert main(["check", theirs]) == 0
    assert main(["import", f"--from={theirs}", f"--to={ours}", "--mesh.data=8"]) == 0
    again = load(ours)
    assert jax.tree.structure(again.params) == jax.tree.structure(found.params)
    rounded = 2e-7 if make is llm_int8 else 0  # 127 times a scale, and that divided by 127
    for ours, theirs in zip(*map(jax.tree.leaves, (again.params, found.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rounded)
    assert again.provenance["quantized"]["method"] == method
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == ["lm_head"]
    if make is llm_int8:
        assert settings["llm_int8_threshold"] == 5.0
        kernel = next(iter(kernels(again.params).values()))
        assert isinstance(kernel, Int8)
        assert kernel.outlier is not None
        assert (kernel.outlier.threshold, kernel.outlier.capacity) == (5.0, 8)


def test_a_folder_is_read_onto_a_mesh_and_computes_the_same(tmp_path):
    coded, _ = folders(tmp_path, "llama", "awq")
    layout = make_layout(make_mesh(MeshConfig(data=2, tensor=2, fsdp=2)))
    split, whole = import_checkpoint(coded, layout=layout), import_checkpoint(coded)
    jax.tree.map(np.testing.assert_array_equal, split.params, whole.params)
    codes = flatten(split.params)["layers/000-002/attention/query/kernel"].codes
    assert codes.addressable_shards[0].data.shape == (2, 8, 128)
    found = logits(split.params, runtime=Runtime(layout=layout))
    np.testing.assert_allclose(found, logits(whole.params), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["zeros", "order", "int8", "coded_scales"])
def test_columns_are_taken_apart_and_put_together_as_they_were(kind):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 192)), jnp.float32)
    order = np.random.default_rng(1).permutation(256).astype(np.int32)
    weight = {
        "zeros": lambda: grouped.quantize(w, 4, 64),
        "order": lambda: Permuted(grouped.quantize(w, 4, 64, symmetric=True), jnp.asarray(order)),
        "int8": lambda: int8.quantize(w, threshold=6.0),
        "coded_scales": lambda: normal_float.quantize(w, double=True),
    }[kind]()
    whole = np.asarray(dequantize(weight))
    parts = [np.arange(64), np.arange(64, 192)]
    taken = [take_columns(weight, columns) for columns in parts]
    np.testing.assert_array_equal(dequantize(taken[1]), whole[:, 64:])
    again = join_columns(taken, parts)
    assert jax.tree.structure(again) == jax.tree.structure(weight)
    jax.tree.map(np.testing.assert_array_equal, again, weight)
    mixed = [np.arange(0, 192, 2), np.arange(1, 192, 2)]  # no whole blocks: scales spread out
    again = join_columns([take_columns(weight, columns) for columns in mixed], mixed)
    np.testing.assert_array_equal(dequantize(again), whole)


def test_layers_with_and_without_zeros_and_an_order_make_one_stack():
    w = jax.random.normal(jax.random.key(0), (64, 64))
    order = jnp.flip(jnp.arange(64, dtype=jnp.int32))
    even, uneven = grouped.quantize(w, 4, 32, symmetric=True), grouped.quantize(w, 4, 32)
    layers = [even, uneven, Permuted(uneven, order)]
    found = stack(alike(layers))
    assert isinstance(found, Permuted)
    np.testing.assert_array_equal(
        dequantize(found), np.stack([dequantize(layer) for layer in layers])
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq'; read are gptq, awq, bitsandbytes"),
        ({"grup_size": 32}, r"quantization_config\.grup_size = 32 is not known.*group_size"),
        ({"bits": 5}, "bits is 5; read is 2, 3, 4, 8"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"dynamic": {"+:.*down": {"bits": 8}}}, "dynamic has '[+]:.*down'"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'; read is 'int32'"),
    ],
)
def test_settings_that_are_not_read_are_named(settings, message):
    known = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    values = {"model_type": "llama", "quantization_config": {**known, **settings}}
    with pytest.raises(FamilyError, match=message):
        split_config(values)
    kept, read = split_config(
        {"quantization_config": {**known, "odd": 1}}, ["quantization_config.odd"]
    )
    assert not kept
    assert read is not None
    assert read.values == {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}


def change(folder, function):
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FamilyError) as error:
        import_checkpoint(folder)
    return str(error.value)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    found = in_formats(lambda w: grouped.quantize(w, 4, 32), tmp_path)
    layer = "model.layers.1.mlp.up_proj"

    export_checkpoint(found, tmp_path / "whole", quantized="gptq")

    def fresh():
        folder = tmp_path / f"copy_{len(list(tmp_path.iterdir()))}"
        return shutil.copytree(tmp_path / "whole", folder)

    assert f"lack tensors (1): {layer}.qzeros" in change(
        fresh(), lambda tensors: tensors.pop(f"{layer}.qzeros")
    )

    def gone(tensors):
        for name in list(tensors):
            if name.startswith(layer):
                del tensors[name]
        tensors["model.layers.0.mlp.up_proj.extra"] = np.zeros(2, np.float32)

    text = change(fresh(), gone)
    assert f"missing (1): {layer}.weight" in text
    assert "unexpected (1): model.layers.0.mlp.up_proj.extra [2]" in text

    def dense(tensors):
        gone(tensors)
        del tensors["model.layers.0.mlp.up_proj.extra"]
        tensors[f"{layer}.weight"] = np.zeros((64, 64), np.float32)

    assert f"{layer}.weight is dense and model.layers.0.mlp.up_proj is" in change(fresh(), dense)

    def misshapen(tensors):
        tensors[f"{layer}.scales"] = tensors[f"{layer}.scales"][:1]

    text = change(fresh(), misshapen)
    assert "model.safetensors" in text
    assert f"{layer}: scales is [1, 64]; the others make it [2, 64]" in text

    def biased(tensors):
        tensors[f"{layer}.bias"] = np.ones(64, np.float16)

    assert f"unexpected (1): {layer}.bias" in change(fresh(), biased)


def test_formats_that_a_layout_cannot_say_are_refused_before_anything_is_written(tmp_path):
    def refused(make, method, message):
        with pytest.raises(FamilyError, match=message):
            export_checkpoint(in_formats(make, tmp_path), tmp_path / "out", quantized=method)
        assert not (tmp_path / "out").exists()

    refused(llm_int8, "gptq", r"q_proj\.weight: a Int8 has no GPTQ layout")
    refused(int8.quantize, "bitsandbytes", "codes inputs too")
    refused(lambda w: w, "awq", "no weight of this checkpoint is in codes")
    refused(lambda w: grouped.quantize(w, 4, 32, scale_dtype=jnp.float32), "awq", "float16")
    with pytest.raises(FamilyError, match="quantized='gguf' is not one of gptq, awq"):
        export_checkpoint(in_formats(lambda w: w, tmp_path), tmp_path / "out", quantized="gguf")
    found = in_formats(lambda w: grouped.quantize(w, 4, 32), tmp_path)
    flat = flatten(found.params)
    path = "layers/000-002/attention/output/kernel"
    flat[path] = stack([grouped.quantize(dequantize(w), 4, 16) for w in unstack(flat[path])])
    mixed = Checkpoint(SMALL, from_flat(flat), {}, {}, tmp_path)
    with pytest.raises(FamilyError, match=r"groups of 32 in .* and of 16 in .*o_proj"):
        export_checkpoint(mixed, tmp_path / "out", quantized="gptq")
    part = flatten(found.params)
    part["layers/000-002/attention/key/kernel"] = dequantize(flat[path])
    half = Checkpoint(SMALL, from_flat(part), {}, {}, tmp_path)
    with pytest.raises(FamilyError, match="in part: layers/000-002/attention/key/kernel is dense"):
        export_checkpoint(half, tmp_path / "out", family="phi3", quantized="gptq")


@pytest.mark.interop
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 1e-5),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 1e-5),
        ({"load_in_8bit": True}, 2e-2),  # theirs rounds inputs to float16 before it codes them
    ],
    ids=["nf4", "fp4_double", "int8"],
)
def test_what_bitsandbytes_saves_is_read_and_it_loads_what_is_written(
    settings, tolerance, tmp_path
):
    pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokens = TOKENS % SMALL.vocab_size

    def load_theirs(folder, **options):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map="cpu", **options
        ).eval()
        for module in model.modules():  # its fused product on CPUs is in bfloat16
            module.support_avx512bf16_for_cpu = False
        return model

    def run(model):
        with torch.no_grad():
            return model(torch.tensor(tokens.astype(np.int64))).logits.numpy()

    export_checkpoint(in_formats(lambda w: 4 * w, tmp_path), tmp_path / "dense")
    quantization = transformers.BitsAndBytesConfig(**settings)
    model = load_theirs(tmp_path / "dense", quantization_config=quantization)
    model.save_pretrained(tmp_path / "theirs")
    found = import_checkpoint(tmp_path / "theirs")
    assert len(kernels(found.params)) == 7
    ours = np.asarray(forward(found.params, jnp.asarray(tokens), SMALL)[0])
    np.testing.assert_allclose(ours, run(model), atol=tolerance)
    export_checkpoint(found, tmp_path / "ours", quantized="bitsandbytes")
    written, given = (
        load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")
    )
    assert written.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    np.testing.assert_allclose(run(load_theirs(tmp_path / "ours")), run(model), atol=1e-5)
