"""Several processes: how they find each other, and which rows of a batch each of them holds."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from child_flags import cpu_devices
from jax.sharding import PartitionSpec as P

from sharding import (
    MeshConfig,
    Processes,
    global_array,
    global_batch,
    initialize_distributed,
    make_layout,
    make_mesh,
    rows_of_process,
)
from sharding.distributed import CLUSTERS, ENVIRONMENT, SLURM

ROOT = Path(__file__).parents[1]


@pytest.fixture
def alone(monkeypatch):
    for name in (*ENVIRONMENT, *SLURM, "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_any_hint_a_run_is_one_process(alone):
    assert initialize_distributed() == Processes(0, 1, "single")
    assert initialize_distributed("localhost:1234", 1, 0).count == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, "coordinator=a:1 given but num_processes and process_id missing"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "'host' is not host:port"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"2 is not one of 0\.\.1"),
    ],
)
def test_half_given_or_impossible_flags_are_errors(alone, arguments, message):
    with pytest.raises(ValueError, match=message):
        initialize_distributed(**arguments)


def test_half_given_environment_names_the_missing_variables(alone):
    alone.setenv("JAX_COORDINATOR_ADDRESS", "node0:8476")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID missing"):
        initialize_distributed()
    alone.setenv("JAX_NUM_PROCESSES", "two")
    alone.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ValueError, match=r"'two'.*whole numbers"):
        initialize_distributed()


def test_slurm_counts_only_inside_a_step_of_several_tasks():
    step = dict.fromkeys(SLURM, "1")
    assert not CLUSTERS["slurm"](step)
    assert CLUSTERS["slurm"]({**step, "SLURM_NTASKS": "4"})
    assert not CLUSTERS["slurm"]({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})


def test_joining_after_a_device_was_used_says_so(alone):
    jax.devices()
    with pytest.raises(RuntimeError, match="before any used a device"):
        initialize_distributed("localhost:1234", 2, 0)


def test_each_process_loads_the_rows_of_its_devices_once():
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    sharding = jax.NamedSharding(mesh, P("data"))
    np.testing.assert_array_equal(rows_of_process(sharding, 8), np.arange(8))
    assert len(rows_of_process(sharding, 8, process=1)) == 0
    with pytest.raises(ValueError, match="6 rows does not divide"):
        rows_of_process(sharding, 6)


def test_a_global_batch_holds_the_rows_in_order_split_by_rows_and_length():
    layout = make_layout(make_mesh(MeshConfig(data=2, context=2, tensor=2)))
    tokens = np.arange(4 * 6, dtype=np.int32).reshape(4, 6)
    batch = global_batch({"tokens": tokens, "source_id": tokens[:, 0]}, layout)
    np.testing.assert_array_equal(batch["tokens"], tokens)
    assert batch["tokens"].sharding.spec == P("data", "context")
    assert batch["source_id"].sharding.spec == P("data")
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(global_array(tokens, layout.sharding(("batch",))), tokens)


WORKER = """
import sys
import jax, numpy as np
from sharding import *

processes = initialize_distributed(timeout=60)
assert (processes.count, processes.source) == (2, "environment"), processes
for axes in (["data"] * 2, ["data", "tensor"], ["tensor"], ["context"], ["fsdp", "context"]):
    sizes = {axis: 4 // len(set(axes)) for axis in axes}
    layout = make_layout(make_mesh(MeshConfig(**{"data": 1, **sizes})))
    tokens = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
    rows = rows_of_process(layout.sharding(("batch",)), 8)
    expected = 4 if {"data", "fsdp"} & set(sizes) else 8
    assert len(rows) == expected, (sizes, rows)
    batch = global_batch({"tokens": tokens[rows], "source_id": tokens[rows, 0]}, layout)
    assert batch["tokens"].shape == (8, 4)
    whole = jax.NamedSharding(layout.mesh, jax.P())
    gathered = jax.jit(lambda x: x, out_shardings=whole)
    np.testing.assert_array_equal(gathered(batch["tokens"]).addressable_data(0), tokens)
    np.testing.assert_array_equal(gathered(batch["source_id"]).addressable_data(0), tokens[:, 0])
    total = jax.jit(lambda x: x.sum(), out_shardings=whole)(batch["source_id"]).addressable_data(0)
    assert int(total) == tokens[:, 0].sum()
print("process", processes.index, "of", processes.count, "done")
"""


def _start(code, index, port, **extra):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_devices(2),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
        **extra,
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_processes_join_share_a_batch_and_sum_over_it():
    port = _free_port()
    workers = [_start(WORKER, index, port) for index in range(2)]
    outputs = [worker.communicate(timeout=180)[0] for worker in workers]
    for index, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
        assert worker.returncode == 0, output
        assert f"process {index} of 2 done" in output


@pytest.mark.slow
def test_a_process_whose_coordinator_never_comes_up_fails_in_time():
    code = "from sharding import initialize_distributed; initialize_distributed(timeout=3)"
    worker = _start(code, 1, _free_port())
    output = worker.communicate(timeout=90)[0]
    assert worker.returncode != 0
    assert "RuntimeError: no coordinator answers at 127.0.0.1" in output
    assert "within 3 s" in output
