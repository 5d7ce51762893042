"""The keys that say which layers of a Qwen attend within a sliding window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from model.config import ModelConfig
from model.families.keys import FamilyError, Keys, Values

Rule = Callable[[int, int], bool]
"""`(layer, max_window_layers) -> whether it slides` where `layer_types` is absent."""

FULL, SLIDING = "full_attention", "sliding_attention"


def last_layers(layer: int, max_window_layers: int) -> bool:
    """Qwen2 and Qwen3: full attention in the first `max_window_layers`, windows after them."""
    return layer >= max_window_layers


def even_first_layers(layer: int, max_window_layers: int) -> bool:
    """Qwen2-MoE: windows in every second of the first `max_window_layers`."""
    return layer % 2 == 0 and layer < max_window_layers


def windows(rule: Rule, default_layers: int) -> Keys:
    """`use_sliding_window`, `sliding_window`, `max_window_layers` and `layer_types`.

    Args:
        rule: which layers slide where `layer_types` is absent.
        default_layers: the number of layers when `num_hidden_layers` is absent.
    """

    def read(values: Values) -> dict[str, Any]:
        window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
        layers = values.get("num_hidden_layers", default_layers)
        leading = values.get("max_window_layers", 28)
        slides = [window is not None and rule(layer, leading) for layer in range(layers)]
        if values.get("layer_types") is not None:
            slides = sliding_layers(values["layer_types"], layers)
        if any(slides) and window is None:
            raise FamilyError(
                f"layer_types has {SLIDING!r}, but use_sliding_window is "
                f"{values.get('use_sliding_window', False)} and sliding_window is "
                f"{values.get('sliding_window', 4096)}"
            )
        if all(slides):
            return {"sliding_window": window}
        sliding = (layer for layer, slide in enumerate(slides) if slide)
        return {"layer_overrides": tuple((layer, "sliding_window", window) for layer in sliding)}

    def write(config: ModelConfig) -> dict[str, Any]:
        found = [config.layer(layer).sliding_window for layer in range(config.num_layers)]
        widths = sorted({width for width in found if width is not None})
        if len(widths) > 1:
            raise FamilyError(
                f"model.sliding_window is {', '.join(map(str, widths))} in different layers; the "
                "family has one width"
            )
        slides = [width is not None for width in found]
        leading = slides.index(True) if widths else config.num_layers
        values: dict[str, Any] = {
            "use_sliding_window": bool(widths),
            "sliding_window": widths[0] if widths else None,
            "max_window_layers": leading,
        }
        if widths and slides != [rule(layer, leading) for layer in range(config.num_layers)]:
            values["layer_types"] = [SLIDING if slide else FULL for slide in slides]
        return values

    names = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    return Keys(names, read, write)


def sliding_layers(kinds: list[str], layers: int) -> list[bool]:
    """`layer_types` as whether each layer slides; raises `FamilyError` for another kind."""
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown:
        raise FamilyError(f"layer_types has {unknown[0]!r}; known: {FULL}, {SLIDING}")
    if len(kinds) != layers:
        raise FamilyError(f"layer_types has {len(kinds)} entries for {layers} layers")
    return [kind == SLIDING for kind in kinds]
