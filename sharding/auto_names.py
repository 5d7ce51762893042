"""What the name of an array says about it: the part that a matrix plays in a block.

Names come from many libraries (`q_proj`, `wq`, `SelfAttention/q`, `attention/self/query`, `c_fc`,
`dense_h_to_4h`), so a path is read as words; the innermost attention or feed-forward part of it
decides which words count.
"""

from __future__ import annotations

import dataclasses
import re

ATTENTION = {"attn", "attention", "selfattention", "crossattention"}
FEED_FORWARD = {"mlp", "ffn", "ff", "feed", "moe", "experts", "expert", "relu"}
VECTORS = {"bias", "scale", "norm", "layernorm", "ln"}
POSITIONS = {"position", "positions", "pos", "wpe"}
HEADS = {"head", "logits", "classifier", "unembed", "score"}

ALIASES = {
    "c_attn": "qkv",
    "query_key_value": "qkv",
    "in_proj": "qkv",
    "wqkv": "qkv",
    "c_fc": "up",
    "fc_in": "up",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    "embed_out": "head",
}
"""Module names whose words would mislead -> a word that says what they are."""

IN_ATTENTION = (
    ({"qkv", "kv", "wkv"}, "fused"),
    ({"q", "query", "wq"}, "query"),
    ({"k", "v", "key", "value", "wk", "wv"}, "key_value"),
    ({"o", "out", "output", "wo", "dense", "proj"}, "attention_out"),
)
IN_FEED_FORWARD = (
    ({"router", "wg"}, "router"),
    ({"up", "gate", "wi", "w1", "w3", "fc1", "in", "intermediate", "lin1", "linear1"}, "up"),
    ({"down", "wo", "w2", "fc2", "out", "output", "lin2", "linear2", "proj"}, "down"),
)
"""Words in order of precedence -> part."""


@dataclasses.dataclass(frozen=True)
class Part:
    """How a matrix is split over `tensor`.

    side: "column" splits outputs, "row" inputs, "whole" neither; "unknown" is for others to say.
    axis: logical axis of the split dimension.
    """

    side: str
    axis: str = "d_ff"


PARTS = {
    "embedding": Part("row", "vocab"),
    "positions": Part("whole"),
    "head": Part("column", "vocab"),
    "query": Part("column", "heads"),
    "key_value": Part("column", "kv_heads"),
    "fused": Part("whole", "heads"),
    "attention_out": Part("row", "heads"),
    "attention_bias": Part("column", "heads"),
    "router": Part("whole"),
    "up": Part("column"),
    "down": Part("row"),
    "vector": Part("whole"),
    "unknown": Part("unknown"),
}
"""Part -> its split. A fused q-k-v matrix stays whole: pieces would mix heads of q, k and v."""


def name_part(path: str) -> str:
    """The key in `PARTS` of the array at a path, by its name; "unknown" if that says nothing."""
    *modules, leaf = path.split("/")
    if words(leaf) & VECTORS:
        return "vector"
    inner = _innermost(modules)
    said = set().union(*(words(module) for module in modules))
    if leaf in ("embedding", "table"):
        if "relative" in said:
            return "attention_bias"
        return "positions" if said & POSITIONS else "embedding"
    if inner is None:
        last = set().union(*(words(module) for module in modules[-2:]))
        return "head" if last & HEADS else _first(IN_FEED_FORWARD, last)
    start, kind = inner
    own = set().union(*(words(module) for module in modules[start + 1 :]))
    if kind == "attention":
        return _first(IN_ATTENTION, own)
    if own == {"gate"} and words(modules[start]) & {"moe", "sparse"}:
        return "router"
    return _first(IN_FEED_FORWARD, own)


def is_expert(path: str) -> bool:
    """True for arrays of the experts of a mixture."""
    return any(words(module) & {"experts", "expert"} for module in path.split("/"))


def words(name: str) -> set[str]:
    """`"SelfAttention"` -> `{"self", "attention"}`, `"q_proj"` -> `{"q", "proj"}`."""
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return set(ALIASES.get(snake, snake).split("_"))


def _innermost(modules: list[str]) -> tuple[int, str] | None:
    for index in reversed(range(len(modules))):
        found = words(modules[index])
        if found & ATTENTION:
            return index, "attention"
        if found & FEED_FORWARD:
            return index, "feed_forward"
    return None


def _first(table: tuple[tuple[set[str], str], ...], found: set[str]) -> str:
    return next((part for known, part in table if found & known), "unknown")
