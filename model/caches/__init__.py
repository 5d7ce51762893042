"""Key-value caches (seam 3): dense, rolling for sliding windows, and paged for serving."""

from model.caches.create import CACHES, init_cache
from model.caches.dense import Dense
from model.caches.paged import PagedCache, PagedStep, init_paged_cache, paged_step
from model.caches.protocol import Cache, DecoderCache, StepMeta
from model.caches.rolling import Rolling

__all__ = [
    "CACHES",
    "Cache",
    "DecoderCache",
    "Dense",
    "PagedCache",
    "PagedStep",
    "Rolling",
    "StepMeta",
    "init_cache",
    "init_paged_cache",
    "paged_step",
]
