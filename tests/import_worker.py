"""One of two processes that import a Hugging Face folder together; a test starts it.

python tests/import_worker.py THEIRS OURS COORDINATOR INDEX
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from safetensors.numpy import load_file

from model.families import export_checkpoint, import_checkpoint
from model.families.reader import WeightFiles
from sharding import MeshConfig, make_layout, make_mesh

read_bytes = 0


def count_reads() -> None:
    """Count what `WeightFiles.read` gives, in bytes."""
    original = WeightFiles.read

    def read(self: WeightFiles, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        global read_bytes
        value = original(self, name, index)
        read_bytes += value.nbytes
        return value

    WeightFiles.read = read


def main(theirs: str, ours: str, coordinator: str, index: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(index))
    count_reads()
    layout = make_layout(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    found = import_checkpoint(theirs, ours, layout=layout)
    whole = load_file(Path(theirs) / "model.safetensors")
    expected = np.stack([whole[f"model.layers.{n}.mlp.up_proj.weight"].T for n in range(3)])
    array = found.params["layers"]["000-003"]["feed_forward"]["up"]["kernel"]
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])
    print("read", read_bytes, "of", sum(value.nbytes for value in whole.values()))
    export_checkpoint(found, Path(ours).with_name("exported"))
    jax.effects_barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
