"""Pages of the key/value cache: who holds which, and which hold a prefix that others can use.

A page is identified by a chain of hashes over all tokens up to its end, so that two sequences
share a page only if everything before it is the same too (the scheme of vLLM's automatic prefix
caching; Kwon et al. 2023 for pages). A page that nobody holds keeps its content, and can be found
again until it is the least recently used one and somebody needs a page. Pure Python; the arrays
themselves are `model/caches/paged.py`'s.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_DIGEST_BYTES = 16
_VERSION = "sheaf pages 1"


def chain_root(extra: Iterable[str] = (), salt: str | None = None) -> bytes:
    """The start of a chain: what besides its tokens decides the content of a page.

    extra: the adapter, the kind and settings of the cache, the revision of the model. salt: only
    sequences with the same one share pages.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    parts = [_VERSION, *extra, "no salt" if salt is None else "salt", salt or ""]
    for part in parts:
        encoded = part.encode("utf-8", errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def extend_chain(
    chain: list[bytes], root: bytes, tokens: Sequence[int], page_size: int, first: int = 0
) -> None:
    """Append the hashes of the full pages that `chain` lacks: `h_i = H(h_{i-1}, tokens of page i)`.

    tokens: those of the sequence from position `first` on, int64. A collision would show one
    user's text to another, so `H` is blake2b with 128 bits.
    """
    for page in range(len(chain), (first + len(tokens)) // page_size):
        start = page * page_size - first
        content = array("q", tokens[start : start + page_size]).tobytes()
        parent = chain[-1] if chain else root
        chain.append(hashlib.blake2b(parent + content, digest_size=_DIGEST_BYTES).digest())


@dataclass
class Node:
    """A page in the tree of cached prefixes: its children continue it."""

    page: int
    digest: bytes
    children: list[Node] = field(default_factory=list)


class PagePool:
    """`num_pages` pages of `page_size` tokens, with a count of holders for each.

    Not safe for threads: the engine's thread owns it.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.num_pages, self.page_size = num_pages, page_size
        self.num_evicted = 0
        self._holders = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._digest: list[bytes | None] = [None] * num_pages
        self._parent: list[bytes] = [b""] * num_pages
        self._page: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, cached ones among them."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """The fraction of pages that somebody holds."""
        return 1.0 - len(self._free) / self.num_pages

    @property
    def num_cached(self) -> int:
        """Pages that can be found by their hash."""
        return len(self._page)

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def pages_for(self, num_tokens: int) -> int:
        """How many pages so many tokens need."""
        return -(-num_tokens // self.page_size)

    def lookup(self, chain: Iterable[bytes]) -> list[int]:
        """The cached pages of the longest known prefix; nobody holds them for that."""
        found = []
        for digest in chain:
            page = self._page.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def available(self, hits: Iterable[int] = ()) -> int:
        """Pages left to allocate once `hits` are held."""
        return len(self._free) - sum(page in self._free for page in hits)

    def hold(self, hits: Iterable[int]) -> None:
        """Add a holder to pages that `lookup` found."""
        for page in hits:
            self._free.pop(page, None)
            self._holders[page] += 1

    def allocate(self, count: int) -> list[int]:
        """Pages with one holder and no content: the least recently used ones, no longer cached.

        Raises `ValueError` if fewer are free; ask `available` first.
        """
        if count > len(self._free):
            raise ValueError(f"{count} pages are asked for; {len(self._free)} are free")
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
            self._forget(page)
        return pages

    def publish(self, page: int, digest: bytes, parent: bytes) -> None:
        """Let a full page be found by its hash; of two with the same content, the first is.

        parent: the hash of the page before, or the chain's root.
        """
        if not self._holders[page]:
            raise ValueError(f"page {page} is published, but nobody holds it")
        if self._digest[page] is None and digest not in self._page:
            self._page[digest] = page
            self._digest[page], self._parent[page] = digest, parent

    def release(self, pages: Sequence[int]) -> None:
        """Take one holder off each of a sequence's pages; its last is the first to be used again,
        since the first ones are those that others may share.
        """
        for page in reversed(pages):
            if not self._holders[page]:
                raise ValueError(f"page {page} is released, but nobody holds it")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free[page] = None

    def reset(self) -> None:
        """Forget all cached prefixes, as after new weights or adapters.

        Raises `ValueError` while somebody holds a page.
        """
        if len(self._free) < self.num_pages:
            held = self.num_pages - len(self._free)
            raise ValueError(f"the prefix cache cannot be emptied: {held} pages are in use")
        for page in range(self.num_pages):
            self._forget(page, evicted=False)

    def tree(self, root: bytes) -> list[Node]:
        """The cached prefixes under a chain's root; pages that no lookup reaches are left out."""
        nodes = {digest: Node(page, digest) for digest, page in self._page.items()}
        top: list[Node] = []
        for digest, node in nodes.items():
            parent = self._parent[self._page[digest]]
            if parent == root:
                top.append(node)
            elif parent in nodes:
                nodes[parent].children.append(node)
        return top

    def _forget(self, page: int, evicted: bool = True) -> None:
        digest, self._digest[page] = self._digest[page], None
        if digest is not None:
            del self._page[digest]
            self.num_evicted += evicted
