"""Pages: nothing leaks, nobody is given another's text, and what was used least recently goes."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.pages import PagePool, chain_root, extend_chain

PAGE = 4


def chain_of(tokens, root, page_size=PAGE):
    chain: list[bytes] = []
    extend_chain(chain, root, tokens, page_size)
    return chain


def fill(pool, tokens, root):
    """Hold and publish pages for a sequence, as a scheduler does; gives them and the hits."""
    chain = chain_of(tokens, root, pool.page_size)
    hits = pool.lookup(chain)
    pool.hold(hits)
    pages = hits + pool.allocate(pool.pages_for(len(tokens)) - len(hits))
    for i, digest in enumerate(chain):
        pool.publish(pages[i], digest, chain[i - 1] if i else root)
    return pages, len(hits)


class Pool(RuleBasedStateMachine):
    """Sequences over two tokens, so that prefixes meet often, in a pool that is too small.

    The model beside it: a count of holders, the content of each page, and the order of release.
    """

    NUM_PAGES = 9

    def __init__(self):
        super().__init__()
        self.pool = PagePool(self.NUM_PAGES, PAGE)
        self.sequences: list[list[int]] = []
        self.content: dict[int, tuple] = {}
        self.free = list(range(self.NUM_PAGES))

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        adapter=st.sampled_from(["", "a"]),
        salt=st.sampled_from([None, "", "a"]),
    )
    def start(self, tokens, adapter, salt):
        root = chain_root([adapter], salt)
        chain = chain_of(tokens, root)
        hits = self.pool.lookup(chain)
        for i, page in enumerate(hits):
            assert self.content[page] == (tuple(tokens[: (i + 1) * PAGE]), adapter, salt)
        known = {content: page for page, content in self.content.items()}
        prefix = (tuple(tokens[: (len(hits) + 1) * PAGE]), adapter, salt)
        assert len(hits) == len(chain) or prefix not in known
        missing = self.pool.pages_for(len(tokens)) - len(hits)
        assert self.pool.available(hits) == len([p for p in self.free if p not in hits])
        if missing > self.pool.available(hits):
            return
        self.free = [page for page in self.free if page not in hits]
        self.pool.hold(hits)
        new = self.pool.allocate(missing)
        assert new == self.free[:missing]
        self.free = self.free[missing:]
        for page in new:
            self.content.pop(page, None)
        pages = hits + new
        for i, digest in enumerate(chain):
            self.pool.publish(pages[i], digest, chain[i - 1] if i else root)
            content = (tuple(tokens[: (i + 1) * PAGE]), adapter, salt)
            if content not in self.content.values():
                self.content[pages[i]] = content
        self.sequences.append(pages)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data):
        pages = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.release(pages)
        held = {page for sequence in self.sequences for page in sequence}
        self.free += [page for page in reversed(pages) if page not in held]

    @rule()
    def reset(self):
        if self.sequences:
            with pytest.raises(ValueError, match="are in use"):
                self.pool.reset()
        else:
            self.pool.reset()
            self.content = {}

    @invariant()
    def counts_are_those_of_the_holders(self):
        held = [page for sequence in self.sequences for page in sequence]
        for page in range(self.NUM_PAGES):
            assert self.pool.holders(page) == held.count(page)
        assert self.pool.num_free == len(self.free) == self.NUM_PAGES - len(set(held))
        assert self.pool.num_cached == len(self.content)

    def teardown(self):
        for pages in self.sequences:
            self.pool.release(pages)
        assert self.pool.num_free == self.NUM_PAGES
        assert self.pool.usage == 0.0


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_page_is_used_again_only_after_all_that_were_used_less_recently():
    pool, root = PagePool(6, PAGE), chain_root()
    first, _ = fill(pool, [1] * 12, root)
    second, _ = fill(pool, [2] * 12, root)
    pool.release(first)
    pool.release(second)
    # Ends go before beginnings, and a hit makes the first sequence's page recent again.
    again, hits = fill(pool, [1] * 4, root)
    assert hits == 1
    pool.release(again)
    assert pool.allocate(6) == [first[2], first[1], second[2], second[1], second[0], first[0]]
    assert pool.num_evicted == 6


def test_nothing_is_given_back_twice_or_found_before_it_is_held():
    pool = PagePool(2, PAGE)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="page 0 is released, but nobody holds it"):
        pool.release(pages)
    with pytest.raises(ValueError, match="page 0 is published, but nobody holds it"):
        pool.publish(0, b"digest", b"root")
    with pytest.raises(ValueError, match="3 pages are asked for; 2 are free"):
        pool.allocate(3)
    with pytest.raises(ValueError, match="page_size is 0"):
        PagePool(1, 0)


def test_a_hash_depends_on_everything_before_a_page_and_on_how_it_was_computed():
    root = chain_root(["adapter", "paged"], "salt")
    chain = chain_of(range(12), root)
    others = [
        chain_of([9, *range(1, 12)], root),
        *(
            chain_of(range(12), chain_root(extra, salt))
            for extra, salt in [
                (["adapter", "int8"], "salt"),
                (["adapterpaged"], "salt"),
                (["adapter"], "pagedsalt"),
                (["adapter", "paged"], None),
                (["adapter", "paged"], ""),
            ]
        ),
    ]
    everything = [digest for one in [chain, *others] for digest in one]
    assert len(set(everything)) == len(everything) == 21
    # Taken up later, from the tokens that were missing, it is the same chain.
    later = chain[:1]
    extend_chain(later, root, range(4, 13), PAGE, first=4)
    assert later == chain
    # 128 bits of blake2b over the page before and int64 ids, nothing that changes from run to run.
    content = chain[0] + struct.pack("<4q", 4, 5, 6, 7)
    assert chain[1] == hashlib.blake2b(content, digest_size=16).digest()


def test_the_tree_shows_who_shares_a_beginning():
    pool, root = PagePool(8, PAGE), chain_root()
    shared = [0] * 8
    one, _ = fill(pool, [*shared, 1, 1, 1, 1], root)
    two, hits = fill(pool, [*shared, 2, 2, 2, 2], root)
    fill(pool, [7] * 4, chain_root(salt="other"))
    assert hits == 2
    (top,) = pool.tree(root)
    (middle,) = top.children
    assert [top.page, middle.page] == one[:2] == two[:2]
    assert [node.page for node in middle.children] == [one[2], two[2]]
