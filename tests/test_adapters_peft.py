"""PEFT's adapters are read and written: the same logits as PEFT's own model, both ways."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from model import Runtime, forward
from model.families import import_checkpoint
from model.peft import CONFIG
from surgery.adapt import adapters, load_peft, save_peft

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "phi3": lambda: transformers.Phi3Config(**SIZES, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=48, n_positions=64, n_embd=32, n_layer=2, n_head=4
    ),
}
CASES = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16}),
    "patterns": (
        "llama",
        {
            "target_modules": r".*\.(q_proj|down_proj)",
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 24},
            "use_rslora": True,
        },
    ),
    "one_layer": (
        "llama",
        {
            "target_modules": ["k_proj", "gate_proj"],
            "layers_to_transform": [1],
            "modules_to_save": ["lm_head"],
        },
    ),
    "all_linear": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "r": 4}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}
TOKENS = np.arange(24).reshape(2, 12) % 48


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.double().numpy()


def our_logits(checkpoint, params):
    tokens = jnp.asarray(TOKENS, jnp.int32)
    return np.asarray(forward(params, tokens, checkpoint.config, Runtime())[0], np.float64)


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_peft_are_read_and_written(name, tmp_path):
    kind, options = CASES[name]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(MODELS[kind]()).eval()
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for key, parameter in model.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    wanted = their_logits(model)

    checkpoint = import_checkpoint(tmp_path / "base")
    values = json.loads(checkpoint.files["config.json"])
    params = load_peft(tmp_path / "adapter", checkpoint.config, checkpoint.params, base=values)
    assert np.abs(wanted - our_logits(checkpoint, checkpoint.params)).max() > 1e-2
    np.testing.assert_allclose(our_logits(checkpoint, params), wanted, atol=1e-4)

    if "modules_to_save" in options:
        return
    ours = save_peft(tmp_path / "ours", checkpoint.config, params, base=values)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, ours).eval()
    np.testing.assert_allclose(their_logits(loaded), wanted, atol=1e-4)
    again = load_peft(ours, checkpoint.config, checkpoint.params, base=values)
    for path, part in adapters(again).items():
        for field, array in adapters(params)[path].items():
            np.testing.assert_allclose(part[field], array, rtol=1e-6, err_msg=f"{path} {field}")
    saved = json.loads((ours / CONFIG).read_text())
    assert saved["peft_type"] == "LORA"
