"""Two real processes import one checkpoint together, each reading its own part."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from child_flags import cpu_devices
from test_families_mesh import CONFIG, folder_of

from model.checkpoint import load
from weights import flatten

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("import_worker.py")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_each_process_reads_its_part_and_they_export_the_whole(tmp_path):
    params = folder_of(CONFIG, tmp_path / "theirs")
    environment = os.environ | {
        "PYTHONPATH": str(WORKER.parent.parent),
        "XLA_FLAGS": cpu_devices(4),
    }
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, tmp_path / "theirs", tmp_path / "ours", coordinator, str(n)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (output, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output + errors
        read, whole = map(int, re.search(r"read (\d+) of (\d+)", output).groups())
        assert read < 0.6 * whole
    found = flatten(load(tmp_path / "ours").params)
    for path, wanted in flatten(params).items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(wanted), err_msg=path)
    written = (tmp_path / "exported" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "theirs" / "model.safetensors").read_bytes()
