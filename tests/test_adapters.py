"""Adapters: attached to any weight, trained alone, merged, taken out again; and PEFT's files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, write_text

from model import ModelConfig, Runtime, forward, init
from model.checkpoint import load, save
from model.peft import CONFIG
from surgery.__main__ import main
from surgery.adapt import (
    AdapterFileError,
    LoRA,
    adapters,
    attach,
    count_adapter_parameters,
    load_peft,
    merge,
    save_peft,
    unmerge,
    without_adapters,
)
from training import load_config, run_config, train_language_model
from weights import LowRank, flatten, grouped, map_with_path, matmul, normal_float

CONFIGS = {
    "llama": ModelConfig(
        vocab_size=48, d_model=32, num_layers=3, num_heads=4, kv_heads=2, d_ff=64, max_length=32
    ),
    "unequal": ModelConfig(
        vocab_size=48, d_model=32, num_layers=3, num_heads=4, kv_heads=2, d_ff=64, max_length=32,
        layer_overrides=((1, "d_ff", 96),),
    ),
}  # fmt: skip
TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) % 48


QUANTIZE = {
    "grouped": jax.jit(jax.vmap(lambda w: grouped.quantize(w, 4, 16))),
    "nf4": jax.jit(jax.vmap(lambda w: normal_float.quantize(w, 16))),
}
RUN = jax.jit(forward, static_argnums=(2, 3))


def quantized(params, kind):
    """The model's linear layers in a format."""
    make = QUANTIZE[kind]

    def convert(path, weight):
        return make(weight) if path.endswith("/kernel") and weight.ndim == 3 else weight

    return map_with_path(convert, params)


def logits(config, params):
    return np.asarray(RUN(params, TOKENS, config, Runtime())[0], np.float64)


def disturbed(params, key=1):
    """With a `b` that is not zero."""
    keys = iter(jax.random.split(jax.random.key(key), 64))
    return map_with_path(
        lambda path, weight: (
            dataclasses.replace(weight, b=0.3 * jax.random.normal(next(keys), weight.b.shape))
            if isinstance(weight, LowRank)
            else weight
        ),
        params,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_changes_nothing_until_it_is_trained(name):
    config = CONFIGS[name]
    params = init(config, jax.random.key(0))
    adapted = attach(params, LoRA(rank=4, alpha=16))
    assert np.array_equal(logits(config, params), logits(config, adapted))
    assert jax.tree.all(jax.tree.map(np.array_equal, without_adapters(adapted), params))


def test_initial_values_do_not_depend_on_how_layers_are_cut_into_segments():
    whole, cut = (attach(init(CONFIGS[n], jax.random.key(0))) for n in ("llama", "unequal"))
    query = [
        flatten(whole)["layers/000-003/attention/query/kernel"].a[2],
        flatten(cut)["layers/002-003/attention/query/kernel"].a[0],
    ]
    assert np.array_equal(*query)


@pytest.mark.parametrize(("hidden", "expected"), [(4096, 2_498_560), (8192, 12_943_360)])
def test_the_number_of_adapter_parameters_is_the_published_one(hidden, expected):
    """Rank 1 on all seven projections of LLaMA-2 7B and 70B."""
    sizes = {
        4096: {"num_layers": 32, "num_heads": 32, "d_ff": 11008},
        8192: {"num_layers": 80, "num_heads": 64, "kv_heads": 8, "d_ff": 28672},
    }[hidden]
    config = ModelConfig(vocab_size=32000, d_model=hidden, **sizes)
    params = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    adapted = jax.eval_shape(lambda params: attach(params, LoRA(rank=1)), params)
    assert count_adapter_parameters(adapted) == expected


@pytest.mark.parametrize("kind", ["grouped", "nf4"])
def test_a_merged_model_computes_what_the_adapted_one_does(kind):
    config = CONFIGS["llama"]
    params = init(config, jax.random.key(0))
    for base in (params, quantized(params, kind)):
        adapted = disturbed(attach(base, LoRA(rank=4, alpha=8, rank_stabilized=True)))
        whole = merge(adapted, jnp.float32)
        assert not any(isinstance(weight, LowRank) for weight in flatten(whole).values())
        change = np.abs(logits(config, adapted) - logits(config, base)).max()
        assert np.abs(logits(config, whole) - logits(config, adapted)).max() < 2e-5 * change
    apart = unmerge(merge(disturbed(attach(params))), adapters(disturbed(attach(params))))
    for path, weight in flatten(without_adapters(apart)).items():
        np.testing.assert_allclose(weight, flatten(params)[path], atol=2e-7, err_msg=path)


def test_the_product_of_the_factors_is_never_made():
    weight = LowRank(jnp.ones((48, 40)), jnp.ones((48, 3)), jnp.ones((3, 40)))
    program = jax.jit(matmul).lower(jnp.ones((5, 48)), weight).compile().as_text()
    made = [line for line in program.splitlines() if "f32[48,40]" in line.partition("=")[2][:14]]
    assert made
    assert all("parameter(" in line for line in made)


def test_experts_and_their_router_are_left_alone_unless_they_are_named():
    mixture = dataclasses.replace(
        CONFIGS["llama"], feed_forward="experts", num_experts=4, experts_per_token=2
    )
    params = init(mixture, jax.random.key(0))
    assert all("/attention/" in path for path in adapters(attach(params)))
    with pytest.raises(ValueError, match=r"experts/up/kernel .* one an expert"):
        attach(params, LoRA(targets="up"))


def test_what_cannot_be_adapted_is_said():
    params = init(CONFIGS["llama"], jax.random.key(0))
    with pytest.raises(ValueError, match=r"targets='querry' matches no kernel; nearest: .*query"):
        attach(params, LoRA(targets="querry"))
    with pytest.raises(ValueError, match=r"rank=33 is larger than .*query/kernel \[32, 32\]"):
        attach(params, LoRA(rank=33, targets="query"))
    with pytest.raises(ValueError, match="rank=0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="has an adapter already"):
        attach(attach(params))
    with pytest.raises(ValueError, match="no adapters"):
        merge(params)
    some = adapters(attach(params, LoRA(targets="query")))
    with pytest.raises(ValueError, match="is a LowRank: unmerge needs plain arrays"):
        unmerge(attach(params), some)


@pytest.mark.slow
def test_only_adapters_train_over_codes_and_the_codes_stay_to_the_bit(tmp_path):
    """QLoRA with the training loop: quantized base, adapters, a run, its resumption, merging."""
    config = tiny_config(write_text(tmp_path))
    base = train_language_model(config, tmp_path / "base", quiet=True)
    read = load(base.workdir)
    start = attach(quantized(read.params, "nf4"), LoRA(rank=4, alpha=8))
    save(tmp_path / "start", read.config, start, read.files)
    tuned = dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train, start_from=str(tmp_path / "start"), trainable=".*/(a|b)", steps=6
        ),
    )
    stopped = train_language_model(tuned, tmp_path / "tuned", stop_at=3, quiet=True)
    result = train_language_model(tuned, tmp_path / "tuned", quiet=True)
    assert stopped.step == 3
    assert result.finished
    sizes = [leaf.size for leaf in jax.tree.leaves(result.state.opt_state) if leaf.ndim]
    assert sum(sizes) == 2 * count_adapter_parameters(start)
    trained = load(result.workdir).params
    assert jax.tree.all(
        jax.tree.map(np.array_equal, without_adapters(trained), without_adapters(start))
    )
    moved = [np.abs(part["b"]).max() for part in adapters(trained).values()]
    assert min(moved) > 0
    lines = (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    whole = train_language_model(tuned, tmp_path / "whole", quiet=True)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.state.params, result.state.params))


def test_adapter_files_come_back_to_the_bit(tmp_path):
    config = CONFIGS["llama"]
    params = init(config, jax.random.key(0))
    adapted = disturbed(attach(params, LoRA(rank=4, alpha=6, targets="attention/.*")))
    save_peft(tmp_path / "adapter", config, adapted)
    again = load_peft(tmp_path / "adapter", config, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, adapted))
    with pytest.raises(AdapterFileError, match="never overwritten"):
        save_peft(tmp_path / "adapter", config, adapted)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"use_dora": True}, "use_dora = True may change numbers"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 8}, r"lora_A is \[4, 32\]; adapter_config.json and the base make it \[8, 32\]"),
        ({"target_modules": ["q_proj"]}, "which adapter_config.json does not mean"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}, "no adapter of"),
    ],
)
def test_an_adapter_file_that_does_not_fit_is_refused_by_field_and_file(field, message, tmp_path):
    config = CONFIGS["llama"]
    params = init(config, jax.random.key(0))
    adapted = disturbed(attach(params, LoRA(rank=4, targets="attention/.*")))
    folder = save_peft(tmp_path / "adapter", config, adapted)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **field}))
    with pytest.raises(AdapterFileError, match=message) as error:
        load_peft(folder, config, params)
    assert str(folder) in str(error.value)


def test_dropout_falls_on_the_adapters_input_in_training_alone():
    config = CONFIGS["llama"]
    params = disturbed(attach(init(config, jax.random.key(0)), LoRA(rank=4, dropout=0.5)))

    def run(key):
        return np.asarray(forward(params, TOKENS, config, Runtime(), rng=key)[0])

    first, again, other = (run(jax.random.key(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-3)
    keep = map_with_path(
        lambda _, weight: (
            dataclasses.replace(weight, dropout=0.0) if isinstance(weight, LowRank) else weight
        ),
        params,
    )
    assert np.array_equal(run(None), np.asarray(forward(keep, TOKENS, config, Runtime())[0]))


def test_the_commands_attach_export_import_merge_and_take_out_again(tmp_path, capsys):
    config = CONFIGS["llama"]
    save(tmp_path / "base", config, init(config, jax.random.key(0)))

    def surgery(method, out, **options):
        flags = [f"--{name}={tmp_path / value}" for name, value in options.items()]
        status = main([method, f"--out={tmp_path / out}", *flags])
        assert status == 0, capsys.readouterr().err
        return tmp_path / out

    surgery("lora", "fresh", checkpoint="base")
    assert "adapter parameters" in capsys.readouterr().out
    recipe = run_config(load_config(f"configs/qlora.py:{tmp_path / 'fresh'}"))
    assert (recipe.train.trainable, recipe.optimizer.b2) == (".*/(a|b)", 0.999)
    fresh = load(tmp_path / "fresh")
    save(tmp_path / "tuned", config, disturbed(fresh.params))
    surgery("export-adapter", "adapter", checkpoint="tuned")
    surgery("import-adapter", "again", checkpoint="base", adapter="adapter")
    surgery("merge", "merged", checkpoint="again")
    apart = load(surgery("unmerge", "apart", checkpoint="merged", adapter="adapter"))
    tuned = load(tmp_path / "tuned").params
    np.testing.assert_allclose(logits(config, apart.params), logits(config, tuned), atol=1e-5)
    assert load(tmp_path / "merged").provenance["parents"] == [str(tmp_path / "again")]
    assert main(["merge", f"--checkpoint={tmp_path / 'base'}", f"--out={tmp_path / 'x'}"]) == 2
    assert "no adapters" in capsys.readouterr().err
