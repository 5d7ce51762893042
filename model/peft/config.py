"""`adapter_config.json` of Hugging Face PEFT: what it says of numbers, which modules it means.

Every field is honoured, known not to change numbers, or refused by name. Source: PEFT's
`LoraConfig` and `check_target_module_exists` (v0.21).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights import nearest

CONFIG = "adapter_config.json"


class AdapterFileError(ValueError):
    """An adapter's files that cannot be read or written as they should; names file and key."""


HONOURED = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "fan_in_fan_out",
        "bias",
        "base_model_name_or_path",
        "revision",
    }
)
CARRIED = frozenset(
    {
        "auto_mapping",
        "task_type",
        "inference_mode",
        "lora_dropout",
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "corda_config",
        "megatron_config",
        "megatron_core",
        "runtime_config",
        "peft_version",
        "qalora_group_size",
        "ensure_weight_tying",
        "lora_ga_config",
    }
)
"""They say how it was trained, and change nothing of what was."""
ALTERED_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Initial values that were taken out of the base: the adapter belongs to what was left of it."""


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's config.

    path: the file.
    values: what it says.
    """

    path: Path
    values: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """Of a module's adapter: the first pattern that fits, or `r`."""
        return int(_by_pattern(self._get("rank_pattern", {}), module, self._get("r", 8)))

    def scale(self, module: str) -> float:
        """What a module's product is multiplied by."""
        alpha = _by_pattern(self._get("alpha_pattern", {}), module, self._get("lora_alpha", 8))
        rank = self.rank(module)
        return float(alpha) / (math.sqrt(rank) if self._get("use_rslora", False) else rank)

    def means(self, module: str) -> bool:
        """Whether the adapter has a part at a module, by the rules of PEFT."""
        excluded = self._get("exclude_modules", None)
        if excluded is not None and _names(excluded, module):
            return False
        wanted = self._get("target_modules", None)
        if wanted == "all-linear":
            if module.split(".")[-1] in ("lm_head", "embed_out", "output"):
                return False
        elif wanted is None or not _names(wanted, module):
            return False
        elif isinstance(wanted, str):
            return True
        return self._means_layer(module)

    def saved(self) -> list[str]:
        """Modules that are stored whole."""
        return list(self._get("modules_to_save", []))

    def dropout(self) -> float:
        """Of the adapter's inputs in training."""
        return float(self._get("lora_dropout", 0.0))

    def _means_layer(self, module: str) -> bool:
        layers = self._get("layers_to_transform", None)
        if layers is None or layers == []:
            return True
        pattern = self._get("layers_pattern", None)
        patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])
        found = None
        for name in patterns or [r"[^.]*"]:
            found = re.match(rf".*\.{name}\.(\d+)\.", module)
            if found:
                break
        chosen = [layers] if isinstance(layers, int) else layers
        return found is not None and int(found[1]) in chosen

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def read_config(folder: Path) -> AdapterConfig:
    """The config of an adapter's folder.

    Raises `AdapterFileError` naming the file and the field that cannot be honoured.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterFileError(f"{path}: there is none; is this an adapter's folder?") from None
    except ValueError as error:
        raise AdapterFileError(f"{path}: no JSON: {error}") from None
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path}: holds {type(values).__name__}, not an object")
    if values.get("peft_type") != "LORA":
        raise AdapterFileError(f"{path}: peft_type is {values.get('peft_type')!r}; LORA is read")
    for name, value in values.items():
        if name not in HONOURED | CARRIED and not _says_nothing(value):
            close = nearest(name, HONOURED)
            raise AdapterFileError(
                f"{path}: {name} = {value!r} may change numbers and is not known here"
                + (f"; nearest known: {close}" if close else "")
            )
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterFileError(f"{path}: bias = {values['bias']!r}: none, all or lora_only")
    return AdapterConfig(path, values)


def altered_base(config: AdapterConfig) -> str | None:
    """The name of an initial value that changed the base, if the config has one."""
    name = config.values.get("init_lora_weights")
    return name if isinstance(name, str) and name.lower().startswith(ALTERED_BASE) else None


def _says_nothing(value: Any) -> bool:
    return value in (None, False, [], {}, "", 0) or value == 0


def _names(wanted: str | Iterable[str], module: str) -> bool:
    """A string is a regex of the whole name; of a list, an entry is the name or the end of it."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
