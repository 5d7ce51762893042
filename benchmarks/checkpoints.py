"""What a checkpoint costs: the pause of a training step, the whole save, and the ways to read it.

    python benchmarks/checkpoints.py [--d-model=768] [--layers=12] [--folder=/a/disk] [--devices=8]

A Llama-style model with AdamW's two moments, float32. "pause" is how long `save` keeps the loop in
asynchronous mode; "whole" is until the checkpoint is committed and flushed, which is what a
synchronous save would pause. The goal is a pause below 20 % of that (MegaScale, arXiv 2402.15627).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices, if there is no other")
    parser.add_argument("--repeats", type=int, default=3)
    known = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={known.devices}"
    with tempfile.TemporaryDirectory(dir=known.folder) as folder:
        measure(known, Path(folder))


def measure(known: argparse.Namespace, folder: Path) -> None:
    import jax

    from model import ModelConfig, abstract, rules
    from model.checkpoint import load
    from sharding import MeshConfig, make_layout, make_mesh
    from training.checkpoints import CheckpointConfig, Checkpoints

    config = ModelConfig(
        vocab_size=known.vocab,
        d_model=known.d_model,
        num_layers=known.layers,
        num_heads=known.d_model // 64,
        max_length=1024,
    )
    layouts = {
        name: make_layout(make_mesh(mesh))
        for name, mesh in (("data", MeshConfig()), ("fsdp", MeshConfig(data=1, fsdp=-1)))
    }
    states = {name: state_on(layout, config, abstract, rules) for name, layout in layouts.items()}
    state = jax.jit(lambda: filled(states["fsdp"]), out_shardings=shardings(states["fsdp"]))()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, state {size / 1e9:.2f} GB")
    with Checkpoints(folder, CheckpointConfig(keep_last=1)) as checkpoints:
        pauses, whole = [], []
        for step in range(1, known.repeats + 1):
            start = time.perf_counter()
            checkpoints.save(step, state, config)
            pauses.append(time.perf_counter() - start)
            checkpoints.wait()
            whole.append(time.perf_counter() - start)
        pause, total = min(pauses), min(whole)
        print(f"save: pause {pause:.3f} s, whole {total:.2f} s ({pause / total:.1%})")
        for name, wanted in states.items():
            seconds = timed(lambda wanted=wanted: checkpoints.restore(None, wanted)[0])
            print(f"restore onto the {name} mesh: {seconds:.2f} s, checksums included")
        print(f"verify alone: {timed(checkpoints.latest_good):.2f} s")
    for name, layout in layouts.items():
        seconds = timed(lambda layout=layout: load(folder, layout).params)
        print(f"load params only onto the {name} mesh: {seconds:.2f} s")


def state_on(layout: Any, config: Any, abstract: Callable, rules: Callable) -> dict[str, Any]:
    """Abstract params and two moments, sharded."""
    import jax

    from sharding import partition

    tree = abstract(config)
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        partition(tree, rules(config), layout),
    )
    return {"params": placed, "optimizer": {"first": placed, "second": placed}}


def filled(abstract: Any) -> Any:
    """Random values, which do not compress."""
    import jax

    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return structure.unflatten(values)


def shardings(abstract: Any) -> Any:
    import jax

    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def timed(function: Callable[[], Any]) -> float:
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
