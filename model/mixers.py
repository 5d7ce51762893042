"""Mixers by name: what moves information along the length."""

from __future__ import annotations

from model import attention, attention_experts
from model.arrays import Part

MIXERS: dict[str, Part] = {
    "attention": Part("attention", attention.arrays, attention.apply),
    "attention_experts": Part("attention", attention_experts.arrays, attention_experts.apply),
}
"""Name -> mixer."""
