"""The configs of published models: their parameters counted to the unit, and their family's words
for them.
"""

import jax
import pytest

from model import abstract, count_parameters, init
from model.families import FAMILIES, config_from_hf, config_to_hf, differences
from training import load_config, run_config

PUBLISHED = {
    "llama2_7b": ("llama", 6_738_415_616),
    "llama2_70b": ("llama", 68_976_648_192),
    "llama3_8b": ("llama", 8_030_261_248),
    "llama31_8b": ("llama", 8_030_261_248),
    "llama32_1b": ("llama", 1_235_814_400),
    "tinyllama_1b": ("llama", 1_100_048_384),
    "smollm_1b7": ("llama", 1_711_376_384),
    "amber_7b": ("llama", 6_738_415_616),
    "k2_65b": ("llama", 65_286_184_960),
    "mistral_7b": ("mistral", 7_241_732_096),
    "mixtral_8x7b": ("mixtral", 46_702_792_704),
    "qwen2_0b5": ("qwen2", 494_032_768),
    "qwen2_1b5": ("qwen2", 1_543_714_304),
    "qwen2_7b": ("qwen2", 7_615_616_512),
    "phi3_mini": ("phi3", 3_821_079_552),
    "gemma_2b": ("gemma", 2_506_172_416),
    "gemma_7b": ("gemma", 8_537_680_896),
    "gpt2": ("gpt2", 124_439_808),
    "gpt3_175b": ("gpt2", 174_615_846_912),
    "gpt_1t": ("gpt2", 1_008_038_758_400),
    "gptj_6b": ("gptj", 6_050_882_784),
    "gpt_neox_20b": ("gpt_neox", 20_554_567_680),
    "pythia_160m": ("gpt_neox", 162_322_944),
    "pythia_410m": ("gpt_neox", 405_334_016),
    "gpt_neo_1b3": ("gpt_neo", 1_315_575_808),
    "opt_125m": ("opt", 125_239_296),
    "opt_350m": ("opt", 331_196_416),
    "opt_1b3": ("opt", 1_315_758_080),
    "bloom_560m": ("bloom", 559_214_592),
    "bloom_7b1": ("bloom", 7_069_016_064),
    "internlm2_1b8": ("internlm2", 1_889_110_016),
    "internlm25_7b": ("internlm2", 7_737_708_544),
    "baichuan2_7b": ("baichuan", 7_505_973_248),
    "jetmoe_8b": ("jetmoe", 8_522_237_952),
    "minicpm_1b": ("minicpm", 1_360_246_272),
    "minicpm_2b": ("minicpm", 2_724_880_896),
    "crystal_7b": ("crystal", 6_575_278_720),
    "geb_1b3": ("geb", 1_348_044_800),
    "pangu_pi_1b_pro": ("llama", 951_983_872),
    "pangu_pi_7b": ("llama", 6_695_555_072),
}
"""Config -> the family that says it, and its published number of parameters."""

NOT_EMBEDDINGS = {"minicpm_1b": 1_247_442_432, "minicpm_2b": 2_442_057_984}
"""What MiniCPM's paper counts."""


def model_of(name):
    return run_config(load_config(f"configs/{name}.py")).model


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters(name):
    model = model_of(name)
    assert count_parameters(model) == PUBLISHED[name][1]
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(model))) == PUBLISHED[name][1]
    if name in NOT_EMBEDDINGS:
        assert count_parameters(model, embeddings=False) == NOT_EMBEDDINGS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_family_has_words_for_all_of_it(name):
    family, model = FAMILIES[PUBLISHED[name][0]], model_of(name)
    values = config_to_hf(family, model)
    assert values["model_type"] in family.model_types
    assert not differences(model, config_from_hf(family, values))


def test_what_is_counted_is_what_is_made():
    for name in ("jetmoe_8b", "opt_350m", "crystal_7b"):
        model = model_of(name)
        made = jax.eval_shape(lambda key, model=model: init(model, key), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(made)) == PUBLISHED[name][1]


def test_jetmoe_acts_with_a_quarter_of_its_parameters():
    assert count_parameters(model_of("jetmoe_8b"), active=True) == 2_331_445_248
