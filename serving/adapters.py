"""Several low-rank adapters over one base: read from their folders, and put beside the weights of
an engine as banks (`weights.low_rank_bank`), of which each token then takes its request's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from model import rules
from model.checkpoint import Checkpoint, check_config, load
from model.checkpoint_folder import CheckpointError
from model.families.keys import FamilyError
from model.peft import CONFIG, AdapterFileError, read_peft
from sharding import Layout, partition
from weights import LowRank, flatten, from_flat, low_rank_bank

Adapters = Mapping[str, str | Path]


def with_adapters(
    checkpoint: Checkpoint, adapters: Adapters, dtype: Any, layout: Layout | None = None
) -> Any:
    """The params of a checkpoint, with a bank in place of each weight that an adapter changes; the
    n-th adapter has number n.

    Args:
        checkpoint: the base; its weights may be any format.
        adapters: name -> a folder of PEFT's, or a checkpoint or run with adapters on this base.
        dtype: of the adapters' arrays, which the engine computes in.
        layout: the one that the checkpoint was loaded with.

    Raises `AdapterFileError` naming the adapter that cannot be read, is not one of this base, or
    changes more than low-rank weights can.
    """
    found = [_read(name, Path(source), checkpoint, layout) for name, source in adapters.items()]
    flat = flatten(checkpoint.params)
    for path, weight in flat.items():
        own = [each.get(path) for each in found]
        if any(one is not None for one in own):
            flat[path] = low_rank_bank.join(weight, own, dtype)
    params = from_flat(flat)
    if layout is None:
        return params
    return jax.device_put(params, partition(params, rules(checkpoint.config), layout))


def _read(
    name: str, folder: Path, checkpoint: Checkpoint, layout: Layout | None
) -> dict[str, LowRank]:
    """The weights with adapters of one folder, by path."""
    if not name:
        raise AdapterFileError(f"the adapter of {folder} has an empty name; give it one")
    try:
        if (folder / CONFIG).exists():
            return _read_theirs(folder, checkpoint)
        return _read_ours(folder, checkpoint, layout)
    except (AdapterFileError, CheckpointError, FamilyError) as error:
        raise AdapterFileError(f"adapter {name!r}: {error}") from error


def _read_theirs(folder: Path, checkpoint: Checkpoint) -> dict[str, LowRank]:
    config_file = checkpoint.files.get("config.json")
    base = None if config_file is None else json.loads(config_file)
    low_rank, whole = read_peft(folder, checkpoint.config, checkpoint.params, base=base)
    ours = flatten(checkpoint.params)
    changed = sorted(path for path, weight in whole.items() if not _equal(weight, ours[path]))
    if changed:
        raise AdapterFileError(
            f"{folder} stores weights whole ({', '.join(changed)}), and adapters that share "
            "a base are low-rank alone; `python -m surgery import-adapter` makes a checkpoint of "
            "it to serve by itself"
        )
    return low_rank


def _read_ours(folder: Path, checkpoint: Checkpoint, layout: Layout | None) -> dict[str, LowRank]:
    """Of a whole checkpoint, whose other weights must be the base's to the bit."""
    read = load(folder, layout)
    check_config(read.folder, checkpoint.config)
    theirs, ours = flatten(read.params), flatten(checkpoint.params)
    low_rank = {path: one for path, one in theirs.items() if isinstance(one, LowRank)}
    if not low_rank:
        raise AdapterFileError(f"{read.folder} has no adapters, and no {CONFIG} beside them")
    bases = theirs | {path: one.base for path, one in low_rank.items()}
    differing = sorted(
        path for path in bases.keys() | ours.keys() if not _equal(bases.get(path), ours.get(path))
    )
    if differing:
        raise AdapterFileError(
            f"{read.folder} differs from the base in more than adapters: {', '.join(differing[:3])}"
            f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''}. It must stand on "
            "this base as it is stored; `python -m surgery export-adapter` writes an adapter alone,"
            " for any base"
        )
    return low_rank


def _equal(one: Any, other: Any) -> bool:
    """Whether two weights, arrays or formats, are stored alike, bit for bit."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and bool(jnp.array_equal(a, b)) for a, b in pairs)
