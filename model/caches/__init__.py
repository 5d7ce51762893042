"""Key-value caches (seam 3): dense, and rolling for sliding windows."""

from model.caches.create import CACHES, init_cache
from model.caches.dense import Dense
from model.caches.protocol import Cache, DecoderCache, StepMeta
from model.caches.rolling import Rolling

__all__ = ["CACHES", "Cache", "DecoderCache", "Dense", "Rolling", "StepMeta", "init_cache"]
