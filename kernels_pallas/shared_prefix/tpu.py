"""Shared-prefix attention on a TPU: its pieces by the ragged paged kernel."""

from __future__ import annotations

import functools
from typing import Any

from kernels_pallas.paged_attention import tpu
from kernels_pallas.shared_prefix import reference
from kernels_pallas.target import Target

obstacle = tpu.obstacle


def shared_prefix_attention(
    *arguments: Any, target: Target | None = None, interpret: Any = False, **options: Any
) -> Any:
    """See `reference.shared_prefix_attention`."""
    pieces = functools.partial(tpu.paged_attention, target=target, interpret=interpret)
    return reference.shared_prefix_attention(*arguments, attention=pieces, **options)
