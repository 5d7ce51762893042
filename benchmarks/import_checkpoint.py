"""How fast a Hugging Face checkpoint is read and written, and what it takes of the host's memory.

    python benchmarks/import_checkpoint.py [--layers=22] [--d-model=2048] [--devices=8]

A Llama-shaped checkpoint of random bfloat16 is made in a temporary folder. Each row is a process of
its own, so its memory is its own: "beyond" is the peak of anonymous memory (what the program took,
without files that the system may drop) less what it had at the start and what the arrays hold on
their devices, which here are host memory too. The issue's bound is twice the largest tensor. Rows
take turns with a plain read of the same files, and the speed is given as a share of it. Files come
from the system's page cache unless the folder is larger than the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

ROWS: dict[str, dict[str, Any]] = {
    "read as it is": {"what": "import"},
    "read as float32": {"what": "import", "dtype": "float32"},
    "read onto a mesh (fsdp x tensor)": {"what": "import", "mesh": True},
    "write": {"what": "export"},
}
"""Row -> what its process does."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--devices", type=int, default=8, help="CPU devices of the mesh row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="a place on the disk to measure")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.row:
        print(json.dumps(measure(known, json.loads(known.row))))
        return
    with tempfile.TemporaryDirectory(dir=known.folder) as folder:
        known.folder = Path(folder)
        print_table(known, compare(known))


def compare(known: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every row's measurements, one a round, each with a plain read of the files next to it."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    child(known, {"what": "make"})
    for _ in range(known.rounds):
        for name, row in ROWS.items():
            found[name].append(child(known, row))
    return found


def child(known: argparse.Namespace, row: dict[str, Any]) -> dict[str, float]:
    """One measurement in a process of its own."""
    devices = known.devices if row.get("mesh") else 1
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "NPROC": str(max(os.cpu_count() or 1, 4 * devices)),
    }
    command = [sys.executable, __file__, f"--row={json.dumps(row)}", f"--folder={known.folder}"]
    command += [f"--layers={known.layers}", f"--d-model={known.d_model}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(known: argparse.Namespace, row: dict[str, Any]) -> dict[str, float]:
    """Make the folder, or read it, or write it again, and watch the memory."""
    import jax
    import jax.numpy as jnp

    from model import ModelConfig
    from model.families import export_checkpoint, import_checkpoint
    from sharding import MeshConfig, make_layout, make_mesh

    config = ModelConfig(
        vocab_size=32000,
        d_model=known.d_model,
        num_layers=known.layers,
        num_heads=known.d_model // 128,
        kv_heads=max(1, known.d_model // 512),
        max_length=2048,
    )
    folder = known.folder / "theirs"
    if row["what"] == "make":
        return make(folder, config)
    layout = None
    if row.get("mesh"):
        layout = make_layout(make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2)))
    jnp.zeros(3).block_until_ready()
    found = None
    if row["what"] == "export":
        found = import_checkpoint(folder)
    with Memory() as memory:
        start = time.perf_counter()
        if found is None:
            found = import_checkpoint(folder, dtype=row.get("dtype"), layout=layout)
            jax.block_until_ready(found.params)
        else:
            export_checkpoint(found, known.folder / f"ours{time.time_ns()}")
        seconds = time.perf_counter() - start
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(found.params))
    size, plain = plain_read(folder)
    return {
        "seconds": seconds,
        "size": size,
        "share": (size / seconds) / plain,
        "beyond": memory.peak - memory.start - (held if row["what"] == "import" else 0),
        "largest": config.vocab_size * config.d_model * 2,
    }


def make(folder: Path, config: Any) -> dict[str, float]:
    """Random bytes in the tensors of a Llama."""
    import jax.numpy as jnp
    import numpy as np

    from model.families import FAMILIES, config_to_hf
    from model.families.plan import their_shapes
    from model.families.writer import write_weights

    family, random = FAMILIES["llama"], np.random.default_rng(0)

    def value(shape: tuple[int, ...]) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    folder.mkdir()
    shapes = their_shapes(family, config)
    tensors = [
        (name, shape, jnp.dtype(jnp.bfloat16), lambda shape=shape: value(shape))
        for name, shape in shapes.items()
    ]
    write_weights(folder, tensors, max_shard_bytes=500_000_000)
    (folder / "config.json").write_text(json.dumps(config_to_hf(family, config)))
    return {}


def plain_read(folder: Path) -> tuple[int, float]:
    """Bytes of the weight files, and the bytes per second at which they are read into a buffer."""
    buffer, size, start = bytearray(16 << 20), 0, time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return size, size / (time.perf_counter() - start)


class Memory:
    """The peak of this process's anonymous memory, in bytes, while it is entered."""

    def __enter__(self) -> Memory:
        self.start = self.peak = anonymous_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, anonymous_memory())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def anonymous_memory() -> int:
    """Bytes that this process took that are no files (Linux)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def print_table(known: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(found.values()))[0]
    title = f"A Hugging Face checkpoint of {first['size'] / 1e9:.2f} GB, bfloat16"
    table = Table("", "GB/s", "of a plain read", "beyond, MB", "of the bound", title=title)
    for name, rows in found.items():
        bound = 2 * first["largest"]
        beyond = max(row["beyond"] for row in rows)
        seconds = statistics.median(row["seconds"] for row in rows)
        share = statistics.median(row["share"] for row in rows)
        table.add_row(
            name,
            f"{first['size'] / seconds / 1e9:.2f}",
            f"{share:.2f}",
            f"{beyond / 1e6:.0f}",
            f"{beyond / bound:.2f}",
        )
    Console().print(table)
    print(f"largest tensor {first['largest'] / 1e6:.0f} MB; median of {known.rounds} rounds")


if __name__ == "__main__":
    main()
