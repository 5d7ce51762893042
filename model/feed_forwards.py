"""Feed-forwards by name: what is computed in each position by itself."""

from __future__ import annotations

from model import feed_forward
from model.arrays import Part
from model.moe import feed_forward as experts

FEED_FORWARDS: dict[str, Part] = {
    "gated": Part("feed_forward", feed_forward.gated_arrays, feed_forward.apply),
    "plain": Part("feed_forward", feed_forward.plain_arrays, feed_forward.apply),
    "experts": Part("feed_forward", experts.arrays, experts.apply),
}
"""Name -> feed-forward."""
