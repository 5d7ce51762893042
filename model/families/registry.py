"""The families that can be read and written, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.families.baichuan import BAICHUAN
from model.families.bloom import BLOOM
from model.families.crystal import BTLM, CRYSTAL, JAIS
from model.families.falcon import FALCON
from model.families.family import Family
from model.families.geb import GEB
from model.families.gemma import GEMMA, GEMMA2
from model.families.gemma3 import GEMMA3, GEMMA3_IMAGES
from model.families.gpt2 import GPT2
from model.families.gpt_neo import GPT_NEO
from model.families.gpt_neox import GPT_NEOX
from model.families.gptj import GPTJ
from model.families.granite import GRANITE
from model.families.internlm2 import INTERNLM2
from model.families.jetmoe import JETMOE
from model.families.keys import FamilyError
from model.families.llama import LLAMA
from model.families.minicpm import MINICPM
from model.families.mistral import MISTRAL
from model.families.mixtral import MIXTRAL
from model.families.olmo2 import OLMO2
from model.families.olmoe import OLMOE
from model.families.opt import OPT
from model.families.phi3 import PHI3
from model.families.qwen2 import QWEN2
from model.families.qwen2_moe import QWEN2_MOE
from model.families.qwen3 import QWEN3
from model.families.qwen3_moe import QWEN3_MOE
from model.families.stablelm import STABLELM
from weights import nearest

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "olmo2": OLMO2,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": OLMOE,
    "jetmoe": JETMOE,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_images": GEMMA3_IMAGES,
    "phi3": PHI3,
    "stablelm": STABLELM,
    "granite": GRANITE,
    "minicpm": MINICPM,
    "internlm2": INTERNLM2,
    "baichuan": BAICHUAN,
    "geb": GEB,
    "gpt2": GPT2,
    "gptj": GPTJ,
    "gpt_neox": GPT_NEOX,
    "gpt_neo": GPT_NEO,
    "opt": OPT,
    "bloom": BLOOM,
    "falcon": FALCON,
    "crystal": CRYSTAL,
    "btlm": BTLM,
    "jais": JAIS,
}
"""Name -> family; the first that can say a model's config is the one it is exported as."""


def by_config(values: Mapping[str, Any]) -> Family | None:
    """The family that a `config.json` names: by its `model_type`, which some old files leave out,
    or else by its first architecture.
    """
    wanted = values.get("model_type")
    if wanted is None:
        named = (values.get("architectures") or [None])[0]
        return next((f for f in FAMILIES.values() if f.architecture == named), None)
    return next((f for f in FAMILIES.values() if wanted in f.model_types), None)


def find(values: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`, by its `model_type`; raises `FamilyError` with the known."""
    family = by_config(values)
    if family is not None:
        return family
    wanted = values.get("model_type")
    known = [name for family in FAMILIES.values() for name in family.model_types]
    raise FamilyError(
        f"{where}/config.json: model_type {wanted!r} is no family that Sheaf reads; nearest: "
        f"{nearest(str(wanted), known) or 'none'}; known: {', '.join(known)}"
    )
