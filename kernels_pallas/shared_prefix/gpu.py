"""Shared-prefix attention on a Hopper GPU: its pieces by the ragged paged kernel."""

from __future__ import annotations

import functools
from typing import Any

from kernels_pallas.paged_attention import gpu
from kernels_pallas.shared_prefix import reference
from kernels_pallas.target import Target


def shared_prefix_attention(
    *arguments: Any, target: Target | None = None, simulate: bool = False, **options: Any
) -> Any:
    """See `reference.shared_prefix_attention`."""
    pieces = functools.partial(gpu.paged_attention, target=target, simulate=simulate)
    return reference.shared_prefix_attention(*arguments, attention=pieces, **options)


def obstacle(target: Target, arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Why the kernel does not serve; None if it does."""
    return gpu.obstacle(target, arguments, {**options, "max_query_length": None})
