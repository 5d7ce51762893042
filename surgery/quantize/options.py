"""What a method is applied to, and how; the same for all methods."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from surgery.quantize.method import Method

KEEP = r"(^|/)(router|shared_gate)/"
ORDERS = ("sequential", "all")


@dataclass(frozen=True)
class Options:
    """What a method is applied to, and how; the same for all methods.

    targets: a regular expression; only kernels whose path below the block it matches somewhere.
    keep: a regular expression of those left as they are; embeddings, norms and head always are.
    order: "sequential" measures a site's inputs after the sites before it are quantized; "all"
        measures a block once.
    micro_batch: windows that are run at a time, at most.
    """

    targets: str = ""
    keep: str = KEEP
    order: str = "sequential"
    micro_batch: int = 8

    def __post_init__(self) -> None:
        for name in ("targets", "keep"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                text = f"{name}={getattr(self, name)!r} is no regular expression: {error}"
                raise ValueError(text) from None
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is not one of {', '.join(ORDERS)}")
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch}; it must be 1 or more")

    def wants(self, path: str) -> bool:
        """Whether the kernel at a path below the block is to be quantized."""
        kept = bool(self.keep) and re.search(self.keep, path) is not None
        return re.search(self.targets, path) is not None and not kept


def settings(method: Method, options: Options) -> dict[str, Any]:
    """As provenance holds them."""
    return {**method.settings(), **dataclasses.asdict(options)}
