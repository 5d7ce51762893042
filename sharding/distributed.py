"""Several processes as one machine: joining them, and batches whose rows are spread over them.

Call `initialize_distributed` before anything else touches a device: a backend that has started
cannot join any more.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from sharding.layout import Layout

logger = logging.getLogger(__name__)

FLAGS = ("coordinator", "num_processes", "process_id")
ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among all of a run.

    index: number of this process, 0 for the coordinator.
    count: number of processes.
    source: "flags", "environment", "slurm", "open mpi", "tpu", "before" (had joined), "single".
    """

    index: int = 0
    count: int = 1
    source: str = "single"


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> Processes:
    """Join the processes of a run, by the first of these that says how; else the run is this one.

    1. the three arguments (`coordinator` is `host:port` of process 0);
    2. `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`;
    3. a Slurm step (`srun`) or Open MPI of more than one task;
    4. a TPU VM, whose metadata tells.

    Raises `ValueError` naming what is missing where only part of it is given, and `RuntimeError` if
    the coordinator does not answer within `timeout` seconds or a device has already been used.
    """
    if jax.distributed.is_initialized():
        return Processes(jax.process_index(), jax.process_count(), "before")
    given = (coordinator, num_processes, process_id)
    found = _complete(FLAGS, given, "flags") or _complete(
        ENVIRONMENT, tuple(os.environ.get(name) or None for name in ENVIRONMENT), "environment"
    )
    if found is not None:
        address, count, index = _parse(*found[1])
        if count == 1:
            return Processes()
        _join(found[0], timeout, coordinator_address=address, num_processes=count, process_id=index)
        return Processes(index, count, found[0])
    for source, present in CLUSTERS.items():
        if present(os.environ):
            _join(source, timeout)
            return Processes(jax.process_index(), jax.process_count(), source)
    return Processes()


def _slurm(environment: Mapping[str, str]) -> bool:
    present = all(name in environment for name in SLURM)
    return present and int(environment["SLURM_NTASKS"]) > 1


def _open_mpi(environment: Mapping[str, str]) -> bool:
    return int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def _tpu(environment: Mapping[str, str]) -> bool:
    wanted = environment.get("JAX_PLATFORMS", "tpu")
    chips = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
    return "tpu" in wanted and chips and importlib.util.find_spec("libtpu") is not None


CLUSTERS: dict[str, Callable[[Mapping[str, str]], bool]] = {
    "slurm": _slurm,
    "open mpi": _open_mpi,
    "tpu": _tpu,
}
"""Where JAX finds out by itself who the others are -> is this such a place."""


def _complete(
    names: tuple[str, ...], values: tuple[Any, ...], source: str
) -> tuple[str, tuple[Any, ...]] | None:
    """The values with their source if all are given, None if none is; some is an error."""
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if len(missing) == len(names):
        return None
    if missing:
        known = ", ".join(
            f"{name}={value}"
            for name, value in zip(names, values, strict=True)
            if value is not None
        )
        raise ValueError(
            f"{known} given but {' and '.join(missing)} missing: several processes need all of "
            f"{', '.join(names)}"
        )
    return source, values


def _parse(address: Any, count: Any, index: Any) -> tuple[str, int, int]:
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator {address!r} is not host:port, such as 10.0.0.1:8476")
    try:
        count, index = int(count), int(index)
    except ValueError:
        raise ValueError(
            f"number of processes {count!r} and process id {index!r} must be whole numbers"
        ) from None
    if not 0 <= index < count:
        raise ValueError(f"process id {index} is not one of 0..{count - 1} ({count} processes)")
    return str(address), count, index


def _join(source: str, timeout: int, **arguments: Any) -> None:
    shown = " ".join(f"{name}={value}" for name, value in arguments.items())
    logger.info(
        "waiting up to %d s for the other processes, as told by %s %s", timeout, source, shown
    )
    if arguments.get("process_id"):
        _await(arguments["coordinator_address"], timeout)
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout)
    except Exception as error:
        raise RuntimeError(
            f"could not join the other processes within {timeout} s (told by {source}; "
            f"{shown or 'found by JAX'}): is process 0 up, its port open, and were all processes "
            f"started, before any used a device? JAX says: {error}"
        ) from error


def _await(address: str, timeout: int) -> None:
    """Return once something listens at an address; if nothing does, JAX would end the process."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"no coordinator answers at {address} within {timeout} s ({error}): is process "
                    "0 up, is this its address, and is the port open?"
                ) from None
            time.sleep(0.2)


def rows_of_process(sharding: Sharding, rows: int, process: int | None = None) -> np.ndarray:
    """Which of a batch's `rows` a process must load: sorted row numbers.

    Processes whose devices hold the same rows (of a tensor-parallel group, say) each get those
    rows. Raises `ValueError` if the rows do not divide over the devices.
    """
    process = jax.process_index() if process is None else process
    try:
        indices = _row_sharding(sharding).devices_indices_map((rows,))
    except ValueError as error:
        raise ValueError(f"a batch of {rows} rows does not divide over the mesh: {error}") from None
    wanted = [
        np.arange(rows)[index[0]]
        for device, index in indices.items()
        if device.process_index == process
    ]
    return np.unique(np.concatenate([np.zeros(0, int), *wanted]))


def global_array(host_rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """One array over all processes from the rows that each has: `[local rows, …] -> [rows, …]`.

    `host_rows` are this process's `rows_of_process`, in that order, each whole (a device takes its
    own part of a row).
    """
    host_rows = np.asarray(host_rows)
    rows = _count_rows(len(host_rows), sharding)
    mine = rows_of_process(sharding, rows)

    def piece(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        local = int(np.searchsorted(mine, start))
        return host_rows[(slice(local, local + stop - start), *index[1:])]

    return jax.make_array_from_callback((rows, *host_rows.shape[1:]), sharding, piece)


def global_batch(batch: Mapping[str, np.ndarray], layout: Layout) -> dict[str, jax.Array]:
    """`global_array` of every array of a batch, `[local rows, length]` or `[local rows]`."""
    return {
        name: global_array(rows, layout.sharding(("batch", "length")[: np.ndim(rows)]))
        for name, rows in batch.items()
    }


def _count_rows(local: int, sharding: NamedSharding) -> int:
    """Rows over all processes, from the share of the pieces that this process holds."""
    pieces = sharding.mesh.size
    share = len(rows_of_process(sharding, pieces))
    if local * pieces % share:
        raise ValueError(
            f"{local} rows are not this process's {share}/{pieces} share of any batch: give each "
            "process the rows that rows_of_process names"
        )
    return local * pieces // share


def _row_sharding(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    return sharding
