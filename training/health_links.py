"""Links between the hosts of a run: each with its neighbours, two at a time, and all in a ring.

Every process calls these together. Two hosts of a pair run a program of their own, so that the time
of a link is its own; pairs that share no host go side by side, so the time does not grow with the
number of hosts.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from training.health import Row, over, timed

PAIR, LOCAL = "pair", "local"


def neighbours(count: int) -> list[list[tuple[int, int]]]:
    """The links of a ring of `count` processes, in rounds in which none stands twice."""
    if count < 2:
        return []
    links = [(i, i + 1) for i in range(count - 1)]
    rounds = [links[0::2], links[1::2], []]
    if count > 2:
        rounds[1 + count % 2].append((count - 1, 0))
    return [links for links in rounds if links]


def check_links(size: int) -> list[Row]:
    """A row for each link that this process is the first end of; `size` bytes go from each device.

    `all_reduce_gb_s` and `permute_gb_s` a device, and `wrong`, words that were not right at this
    end. Blocks until both ends of a link are there.
    """
    me, rows = jax.process_index(), []
    for number, links in enumerate(neighbours(jax.process_count())):
        multihost_utils.sync_global_devices(f"links of round {number}")
        rows += [_check_link(link, size) for link in links if me in link]
    return [row for row in rows if row["ends"][0] == me or row["wrong"]]


def _check_link(link: tuple[int, int], size: int) -> Row:
    by_process = [[d for d in jax.devices() if d.process_index == end] for end in link]
    local = min(map(len, by_process))
    devices = np.array([devices[:local] for devices in by_process])
    mesh = Mesh(devices, (PAIR, LOCAL))
    words = max(size // 4, 1)
    numbers = np.arange(2 * local * words, dtype=np.int32).reshape(2, local, words) % 8191
    sharding = NamedSharding(mesh, P((PAIR, LOCAL)))
    flat = numbers.reshape(2 * local, words)
    placed = jax.make_array_from_callback(flat.shape, sharding, lambda index: flat[index])
    wanted = {
        "all_reduce": np.concatenate([numbers.sum(0)] * 2),
        "permute": numbers[::-1].reshape(flat.shape),
    }
    operations = {
        "all_reduce": lambda x: jax.lax.psum(x, PAIR),
        "permute": lambda x: jax.lax.ppermute(x, PAIR, [(0, 1), (1, 0)]),
    }
    row: Row = {"ends": list(link), "wrong": 0}
    for name, operation in operations.items():
        run = over(mesh, operation)
        result, seconds = timed(lambda run=run: run(placed))
        row[f"{name}_gb_s"] = words * 4 / seconds / 1e9
        row["wrong"] += sum(
            int((np.asarray(shard.data) != wanted[name][shard.index]).sum())
            for shard in result.addressable_shards
        )
    return row


def check_ring(size: int) -> Row:
    """All devices hand on to the next at once: `gb_s` a device, `wrong`, devices of this process
    that got something else than what was sent.
    """
    devices = jax.devices()
    number = {device: i for i, device in enumerate(devices)}
    count, words = len(devices), max(size // 4, 1)
    mesh = Mesh(np.array(devices), (PAIR,))
    sharding = NamedSharding(mesh, P(PAIR))

    def sent(index: int) -> np.ndarray:
        return (np.arange(words, dtype=np.int32) + 17 * index) % 8191

    placed = jax.make_array_from_callback(
        (count, words),
        sharding,
        lambda index: np.stack(
            [sent(i) for i in range(*(index or [slice(None)])[0].indices(count))]
        ),
    )
    onward = [(i, (i + 1) % count) for i in range(count)]
    run = over(mesh, lambda x: jax.lax.ppermute(x, PAIR, onward))
    result, seconds = timed(lambda: run(placed))
    wrong = [
        shard.device.id
        for shard in result.addressable_shards
        if (np.asarray(shard.data)[0] != sent((number[shard.device] - 1) % count)).any()
    ]
    return {"gb_s": words * 4 / seconds / 1e9, "wrong": wrong}
