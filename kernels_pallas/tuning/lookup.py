"""The block sizes of a call, from what is on disk; never measures, compiles or runs anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.tuning.key import Key, code_version, is_current
from kernels_pallas.tuning.store import Blocks, Choice, Table, cache_file, read, shipped_file


@dataclass(frozen=True)
class _Set:
    """What `use` has set: blocks by kernel, a table, and whether nothing else counts."""

    blocks: tuple[tuple[str, tuple[tuple[str, int | str], ...]], ...] = ()
    table: str | None = None
    only: bool = False


_set = jax.make_user_context(default_value=_Set())  # part of the key that jit caches under


def best(
    key: Key,
    default: Blocks,
    *,
    fits: Callable[[Blocks], bool] | None = None,
    table: Table | None = None,
) -> dict[str, Any]:
    """Block sizes for a call.

    In this order: what `use` sets by hand; the bucket of the key in `table`, in the table of `use`,
    in the user's cache and in the shipped table; the nearest bucket in any of them; the default.
    Choices of another version of the kernel's code are passed over. With several processes the
    user's cache is passed over too, as all of them must compile the same program.

    Args:
        key: the call.
        default: the kernel's own sizes, by name; a choice has the same names.
        fits: whether sizes are right for exactly this call; a choice that is not is passed over.
        table: tried first.

    Raises `ValueError` if sizes set by hand have another name or do not fit.
    """
    by_hand = dict(_set.value.blocks).get(key.kernel)
    if by_hand is not None:
        return _checked(key, dict(by_hand), default, fits)
    for choice in _nearest_first(key, table):
        usable = choice.blocks.keys() == default.keys() and (fits is None or fits(choice.blocks))
        if usable and is_current(key.kernel, choice.code):
            return dict(choice.blocks)
    return dict(default)


def _nearest_first(key: Key, table: Table | None) -> Iterator[Choice]:
    bucket, found = key.bucket(), []
    for order, choices in enumerate(_tables(key.device_kind, table)):
        for other, choice in choices.items():
            distance = bucket.distance(other)
            if distance is not None:
                found.append((distance, order, str(other), choice))
    return (choice for *_, choice in sorted(found, key=lambda row: row[:3]))


def _tables(device_kind: str, table: Table | None) -> Iterator[Table]:
    if table is not None:
        yield table
    if _set.value.table is not None:
        yield read(Path(_set.value.table))
    if not _set.value.only:
        if jax.process_count() == 1:
            yield read(cache_file(device_kind))
        yield read(shipped_file(device_kind))


def _checked(
    key: Key,
    by_hand: dict[str, int | str],
    default: Blocks,
    fits: Callable[[Blocks], bool] | None,
) -> dict[str, Any]:
    wrong = by_hand.keys() - default.keys()
    if wrong:
        raise ValueError(
            f"{key.kernel} has no block sizes {sorted(wrong)}; it has {sorted(default)}"
        )
    blocks = {**default, **by_hand}
    if fits is not None and not fits(blocks):
        raise ValueError(
            f"block sizes {blocks} do not fit {key}; the kernel's own: {dict(default)}"
        )
    return blocks


@contextmanager
def use(
    blocks: Mapping[str, Blocks] | None = None,
    *,
    table: str | os.PathLike[str] | None = None,
    only: bool = False,
) -> Iterator[None]:
    """Set block sizes for what is traced inside; functions that were jitted before are traced anew.

        with tuning.use({"grouped_matmul.blocks": {"rows": 64}}):
            step(params, batch)

    Args:
        blocks: kernel -> sizes by name; names left out keep the kernel's own size.
        table: a file as `tune --table` writes it; goes before the cache and the shipped tables.
        only: neither the cache nor the shipped tables count, so that what is not set is the
            kernel's own: the same on every machine.

    One `use` inside another adds to it. Raises `ValueError` if there is no such kernel or file.
    """
    outer, blocks = _set.value, blocks or {}
    for kernel in blocks:
        code_version(kernel)
    if table is not None and not Path(table).is_file():
        raise ValueError(f"table {os.fspath(table)!r} is no file; `tune --table=FILE` writes one")
    pairs = {kernel: tuple(sorted(sizes.items())) for kernel, sizes in blocks.items()}
    inner = _Set(
        tuple(sorted({**dict(outer.blocks), **pairs}.items())),
        outer.table if table is None else os.path.abspath(table),
        only or outer.only,
    )
    with _set(inner):
        yield
