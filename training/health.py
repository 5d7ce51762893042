"""What every chip and link of a host can be asked before a run is trusted to it.

Each check computes something whose answer is known to the bit, so that a wrong one is a fault and
no rounding, and says how fast it went. Wrong answers and devices far slower than their neighbours
are problems (`training.health_report`). After MegaScale (arXiv 2402.15627), section 4, which found
one host in two hundred to be 10 % slow.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """How much a health check does.

    matmul_size: rows and columns of a product; a multiple of 8, at most 8192.
    matmul_repeats: products in one program.
    memory_bytes: of each device's memory that are written, read and compared, twice.
    transfer_bytes: sent to each device and back.
    exchange_bytes: of each device, in exchanges between devices and hosts.
    """

    matmul_size: int = 4096
    matmul_repeats: int = 32
    memory_bytes: int = 2**31
    transfer_bytes: int = 2**28
    exchange_bytes: int = 2**26


SIZES: dict[str, HealthConfig] = {
    "cpu": HealthConfig(512, 4, 2**24, 2**23, 2**20),
    "accelerator": HealthConfig(),
}
"""What a check does by kind of device: each takes well below 10 s."""


def sizes() -> HealthConfig:
    """The sizes for this process's devices."""
    return SIZES["cpu" if jax.default_backend() == "cpu" else "accelerator"]


def check_devices(config: HealthConfig) -> list[Row]:
    """A row of results for each device of this process."""
    return [
        {"device": device.id, "kind": device.device_kind}
        | check_matmul(device, config)
        | check_memory(device, config.memory_bytes)
        | check_transfer(device, config.transfer_bytes)
        for device in jax.local_devices()
    ]


def check_matmul(device: Any, config: HealthConfig) -> Row:
    """Products of whole numbers: `matmul_tflops`, and `matmul_wrong`, rows whose sum is not right.

    The entries are from -2 to 2, so float32 sums are exact up to 4 x 8192; the sum over a row is
    checked on the device against `a (b 1)`, which the host has computed in 64 bits.
    """
    size, repeats = config.matmul_size, config.matmul_repeats
    rows, columns = np.arange(size)[:, None], np.arange(size)[None]
    a = (7 * rows + 3 * columns + rows * columns) % 5 - 2
    b = (2 * rows + 11 * columns + rows * columns) % 5 - 2
    expected = (a @ b.sum(1, dtype=np.int64)).astype(np.int32)
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    placed = [
        jax.device_put(jnp.asarray(x, dtype), device)
        for x in (a.astype(np.int8), b.astype(np.int8))
    ]
    wrong, seconds = timed(
        lambda: _products(*placed, jax.device_put(expected, device), repeats=repeats)
    )
    tflops = 2 * size**3 * repeats / seconds / 1e12
    return {"matmul_tflops": tflops, "matmul_wrong": int(wrong)}


def _products_of(a: jax.Array, b: jax.Array, expected: jax.Array, repeats: int) -> jax.Array:
    def body(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        wrong, b = carry
        product = jnp.dot(a, b, preferred_element_type=jnp.float32)
        sums = product.astype(jnp.int32).sum(1)
        # Columns change places, so that no product can be left out; the sums stay.
        return wrong + (sums != expected).sum(dtype=jnp.int32), jnp.roll(b, 1, axis=1)

    return jax.lax.fori_loop(0, repeats, body, (jnp.int32(0), b))[0]


_products = jax.jit(_products_of, static_argnames="repeats")


def check_memory(device: Any, size: int) -> Row:
    """A pattern that differs in every word, and its complement: `memory_gb_s`, `memory_wrong`."""
    with jax.default_device(device):
        first, flipped = _compare(_write(size // 4), np.uint32(0))  # compiles
        start = time.perf_counter()
        second, _ = jax.block_until_ready(_compare(flipped, np.uint32(0xFFFFFFFF)))
        seconds = time.perf_counter() - start
    return {"memory_gb_s": 2 * size / seconds / 1e9, "memory_wrong": int(first) + int(second)}


def _hash(count: int) -> jax.Array:
    x = jax.lax.iota(jnp.uint32, count) * jnp.uint32(2654435761)
    return x ^ (x >> 15)


_write = jax.jit(_hash, static_argnums=0)


def _compare_words(
    pattern: jax.Array, flipped: jax.Array | np.uint32
) -> tuple[jax.Array, jax.Array]:
    wanted = _hash(pattern.size) ^ flipped
    return (pattern != wanted).sum(dtype=jnp.int32), ~pattern


_compare = jax.jit(_compare_words, donate_argnums=0)


def check_transfer(device: Any, size: int) -> Row:
    """Bytes to a device and back: `to_device_gb_s`, `from_device_gb_s`, `transfer_wrong`."""
    words = (np.arange(size // 4, dtype=np.uint32) * np.uint32(2654435761)) ^ np.uint32(0x5A5A5A5A)
    placed, to_seconds = timed(lambda: jax.device_put(words, device))
    back, from_seconds = timed(lambda: np.array(placed + jnp.uint32(0)))
    wrong = int((back != words).sum())
    return {
        "to_device_gb_s": words.nbytes / to_seconds / 1e9,
        "from_device_gb_s": words.nbytes / from_seconds / 1e9,
        "transfer_wrong": wrong,
    }


def check_exchange(config: HealthConfig) -> Row:
    """All-to-all, all-reduce and both ways round the ring, over this process's devices.

    Gives `{name}_gb_s` a device, and `exchange_wrong`, words that were not right; empty for one
    device.
    """
    devices = np.array(jax.local_devices())
    if len(devices) < 2:
        return {}
    mesh = Mesh(devices, ("device",))
    count = len(devices)
    each = max(config.exchange_bytes // 4 // count, 1)
    numbers = np.arange(count * count * each, dtype=np.int32).reshape(count * count, each) % 8191
    sharded = jax.device_put(numbers, NamedSharding(mesh, P("device")))
    blocks = numbers.reshape(count, count, each)
    wanted = {
        "all_to_all": blocks.transpose(1, 0, 2).reshape(numbers.shape),
        "all_reduce": np.tile(blocks.sum(0), (count, 1)),
        "ring": numbers,
    }
    row: Row = {"exchange_wrong": 0}
    for name, operation in _operations(count).items():
        run = over(mesh, operation)
        result, seconds = timed(lambda run=run: run(sharded))
        row["exchange_wrong"] += int((np.asarray(result) != wanted[name]).sum())
        row[f"{name}_gb_s"] = count * each * 4 / seconds / 1e9
    return row


def _operations(count: int) -> dict[str, Callable[[jax.Array], jax.Array]]:
    onward = [(i, (i + 1) % count) for i in range(count)]
    back = [(j, i) for i, j in onward]

    def ring(x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(jax.lax.ppermute(x, "device", onward), "device", back)

    return {
        "all_to_all": lambda x: jax.lax.all_to_all(x, "device", 0, 0, tiled=True),
        "all_reduce": lambda x: jax.lax.psum(x, "device"),
        "ring": ring,
    }


def over(mesh: Mesh, operation: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """An operation on each device's rows, compiled for all devices of a mesh."""
    names = tuple(mesh.axis_names)
    return jax.jit(
        jax.shard_map(operation, mesh=mesh, in_specs=P(names), out_specs=P(names), check_vma=False)
    )


def timed(function: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    """A function's result, and the least seconds of `repeats` calls after one that compiles."""
    result = jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return result, min(times)
