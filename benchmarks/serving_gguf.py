"""Write a Hugging Face folder of a Llama as GGUF in float32, for llama.cpp.

    python benchmarks/serving_gguf.py HF_FOLDER OUT.gguf

Needs `gguf` and NumPy only, so that the interpreter that has llama.cpp can run it. A byte-level BPE
tokenizer with GPT-2's split is expected.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def main(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    describe(writer, config)
    add_tokenizer(writer, folder)
    for path in sorted(folder.glob("*.safetensors")):
        for name, array in tensors(path):
            writer.add_tensor(renamed(name), arranged(name, array, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, config: dict[str, Any]) -> None:
    """The sizes of the model."""
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_name("llama-12m")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def add_tokenizer(writer: Any, folder: Path) -> None:
    """Tokens, their kinds and merges."""
    described = json.loads((folder / "tokenizer.json").read_text())
    model, special = described["model"], {t["id"] for t in described["added_tokens"]}
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [kinds.CONTROL if i in special else kinds.NORMAL for i in range(len(tokens))]
    )
    merges = model["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def tensors(path: Path) -> list[tuple[str, np.ndarray]]:
    """The float32 tensors of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head, data = json.loads(content[8 : 8 + size]), memoryview(content)[8 + size :]
    head.pop("__metadata__", None)
    found = []
    for name, facts in head.items():
        start, stop = facts["data_offsets"]
        assert facts["dtype"] == "F32", f"{name} is {facts['dtype']}; it must be F32"
        found.append((name, np.frombuffer(data[start:stop], np.float32).reshape(facts["shape"])))
    return found


def renamed(name: str) -> str:
    """llama.cpp's name of a tensor."""
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.weight"
    return f"{NAMES['.'.join(parts)]}.weight"


def arranged(name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Queries and keys with the two halves of a head interleaved, as llama.cpp rotates them."""
    kinds = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    kind = next((key for part, key in kinds.items() if part in name), None)
    if kind is None:
        return array
    halves = array.reshape(config[kind], 2, -1, array.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
