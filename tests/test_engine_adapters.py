"""Several adapters over one base: every request gets what its own adapted model alone gives."""

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG as WINDOWED
from tiny_engine import SETTINGS, TOKENIZER, checkpoint, params_of

from model import forward, generate, rules
from model.checkpoint import save
from model.peft import AdapterFileError
from serving import Engine, ParameterError, SamplingParams
from serving.device import prepared
from sharding import MeshConfig, make_layout, make_mesh, partition
from surgery.adapt import LoRA, attach, save_peft
from weights import LowRank, int8, map_with_path, stack

CONFIG = dataclasses.replace(WINDOWED, layer_overrides=())
NEW = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW)
SHARED = list(b"a prefix that many share")
TARGETS = {"law": LoRA(rank=3, alpha=6, targets="query|down"), "tales": LoRA(2, 4, targets=".*")}
NAMES = (None, *TARGETS)


def adapted(name, base):
    """The base with an adapter that changes what it says."""
    if name is None:
        return base
    keys = iter(jax.random.split(jax.random.key(len(name)), 64))

    def moved(_, weight):
        if not isinstance(weight, LowRank):
            return weight
        return dataclasses.replace(weight, b=0.5 * jax.random.normal(next(keys), weight.b.shape))

    return map_with_path(moved, attach(base, TARGETS[name]))


def base_checkpoint(params):
    return dataclasses.replace(checkpoint(), config=CONFIG, params=params)


QUANTIZE = jax.jit(int8.quantize)


def quantized():
    def change(path, leaf):
        if not path.startswith("layers/") or not path.endswith("/kernel"):
            return leaf
        return stack([QUANTIZE(matrix) for matrix in leaf])

    return map_with_path(change, params_of(CONFIG))


def folders(tmp_path, base):
    """One adapter as a checkpoint of ours, the other as files of PEFT's."""
    law = save(tmp_path / "law", CONFIG, adapted("law", base))
    return {"law": law, "tales": save_peft(tmp_path / "tales", CONFIG, adapted("tales", base))}


def alone(name, base, prompts):
    made = generate(
        prepared(adapted(name, base)), prompts, CONFIG,
        max_new_tokens=NEW, stop_tokens=(TOKENIZER.eos,),
    )  # fmt: skip
    return [tuple(row) for row in made.lists()]


def asked(count):
    """Prompts in turn for the base and each adapter, most with a prefix that all share."""
    prompts = [[*SHARED[: 8 + 4 * (i % 5)], i] if i % 4 else [i, 7] for i in range(count)]
    return [(prompt, NAMES[i % 3]) for i, prompt in enumerate(prompts)]


def check_mixed(engine, base, requests):
    prompts, names = zip(*requests, strict=True)
    found = [result.token_ids for result in engine.generate(prompts, GREEDY, names)]
    told = {}
    for name in NAMES:
        own = [i for i, each in enumerate(names) if each == name]
        told[name] = dict(zip(own, alone(name, base, [prompts[i] for i in own]), strict=True))
        assert [found[i] for i in own] == list(told[name].values()), name
    return told


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    paths = folders(tmp_path_factory.mktemp("adapters"), params_of(CONFIG))
    with Engine(base_checkpoint(params_of(CONFIG)), SETTINGS, adapters=paths) as running:
        yield running


def test_each_request_of_a_mixed_batch_gets_its_own_adapters_answer(engine):
    """Prompts in chunks, prefixes found again, and too few pages for all."""
    check_mixed(engine, params_of(CONFIG), asked(18))
    stats = engine.stats()
    assert stats.preemptions
    assert stats.prefix_hits
    assert stats.pages_free == stats.pages_total


def test_pages_are_found_again_only_by_the_same_adapter(engine):
    engine.reset_prefix_cache()

    def cached(name):
        short = dataclasses.replace(GREEDY, max_tokens=1)
        return engine.generate([SHARED[:12]], short, name)[0].choices[0].cached_tokens

    # The last token is computed in any case, and with it its page.
    assert [cached(name) for name in (None, "law", "tales", None, "law")] == [0, 0, 0, 8, 8]


def test_scores_and_vectors_are_the_adapted_models(engine):
    for name in NAMES:
        logits = forward(adapted(name, params_of(CONFIG)), jnp.asarray([SHARED]), CONFIG)[0][0]
        logprobs = np.asarray(jax.nn.log_softmax(logits), np.float64)
        found = [each.logprob for each in engine.score(SHARED, adapter=name)]
        expected = logprobs[np.arange(len(SHARED) - 1), SHARED[1:]]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    vectors = [engine.embed([SHARED], adapter=name)[0] for name in NAMES]
    assert min(np.abs(vectors[0] - other).max() for other in vectors[1:]) > 1e-2


def test_what_is_no_adapter_of_the_engine_is_refused_by_name(engine, tmp_path):
    with pytest.raises(ParameterError, match="adapter is 'lore'; it must be one of law, tales"):
        engine.score(SHARED, adapter="lore")

    async def submit():
        engine.submit(SHARED, GREEDY, adapter="lore")

    with pytest.raises(ParameterError, match="adapter is 'lore'"):
        asyncio.run(submit())

    def refused(folder, message):
        with pytest.raises(AdapterFileError, match=message):
            Engine(base_checkpoint(params_of(CONFIG)), SETTINGS, adapters={"x": folder})

    plain = save(tmp_path / "plain", CONFIG, params_of(CONFIG))
    refused(plain, "adapter 'x': .*plain has no adapters, and no adapter_config.json")
    moved = adapted("law", jax.tree.map(lambda leaf: leaf * 1.5, params_of(CONFIG)))
    other = save(tmp_path / "other", CONFIG, moved)
    refused(other, "differs from the base in more than adapters: embed/table, .* and .* more")
    refused(tmp_path / "nothing", "adapter 'x': .*nothing")
    narrow = dataclasses.replace(CONFIG, num_layers=1)
    params = attach(params_of(narrow), LoRA(2))
    refused(save(tmp_path / "narrow", narrow, params), "another architecture: .*num_layers is 1")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_quantized_base_on_one_device_or_a_mesh_serves_them_too(devices, tmp_path):
    base = quantized()
    paths, layout, placed = folders(tmp_path, base), None, base
    if devices > 1:
        layout = make_layout(make_mesh(MeshConfig(data=4, tensor=2)))
        placed = jax.device_put(base, partition(base, rules(CONFIG), layout))
    with Engine(base_checkpoint(placed), SETTINGS, layout, paths) as engine:
        check_mixed(engine, base, asked(6))


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_adapters_of_peft_are_served_as_peft_computes_them(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    safetensors = pytest.importorskip("safetensors.numpy")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    kinds = {
        "few": {"target_modules": ["q_proj", "lm_head"], "r": 4, "lora_alpha": 16},
        "all": {"target_modules": "all-linear", "r": 2, "use_rslora": True},
        "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }
    tokens = [3, 1, 4, 15, 9, 26, 5, 35]
    expected = {}
    for name, options in kinds.items():
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            found = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()
        expected[name] = found[np.arange(len(tokens) - 1), tokens[1:]]
    paths = {name: tmp_path / name for name in ("few", "all")}
    settings = dataclasses.replace(SETTINGS, model_name="base")
    engine = Engine.open(tmp_path / "base", settings, adapters=paths)
    for name in paths:
        scored = [each.logprob for each in engine.score(tokens, adapter=name)]
        np.testing.assert_allclose(scored, expected[name], atol=1e-4)
    with pytest.raises(AdapterFileError, match=r"'whole'.* stores weights whole \(head/kernel\)"):
        Engine.open(tmp_path / "base", settings, adapters={"whole": tmp_path / "whole"})
    file = tmp_path / "whole" / "adapter_model.safetensors"
    tensors = safetensors.load_file(file)
    tensors["base_model.model.model.embed_tokens.weight"] = np.zeros((50, 32), np.float32)
    safetensors.save_file(tensors, file)
    with pytest.raises(AdapterFileError, match=r"embed_tokens.weight is \[50, 32\], the model's"):
        Engine.open(tmp_path / "base", settings, adapters={"new tokens": tmp_path / "whole"})
