"""Peak memory and speed of `python -m surgery` on a random checkpoint of Llama-2 7B's shape.

    python benchmarks/quantization_memory.py --method=rtn                # 32 layers, 13 GB of disk
    python benchmarks/quantization_memory.py --method=gptq --layers=2 --windows=8 --length=512

The checkpoint is written layer by layer and deleted afterwards (twice its size is needed for a
while); surgery runs in a process of its own. Peaks are of its own memory (anonymous pages) and with
mapped files, which the system takes back when others need them. Both are compared with a block in
float32, and the seconds a layer with the matmul floor: the products that a calibration cannot do
without (the block once, and the Gram matrices of its four inputs) at the speed of a large float32
product here. More flags of the method follow `--`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without an installation

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from data import ByteTokenizer
from model import ModelConfig, abstract, checkpoint
from model.checkpoint_folder import PROVENANCE, read_json
from weights import flatten, from_flat

ROOT = Path(__file__).parents[1]
STD = 0.02


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status of surgery."""
    options = parse(arguments)
    config = ModelConfig(
        vocab_size=options.vocab,
        d_model=options.d_model,
        num_layers=options.layers,
        num_heads=options.heads,
        d_ff=options.d_ff,
        max_length=4096,
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        print(f"writing {options.layers} layers …", file=sys.stderr)
        write(config, folder)
        status, peaks, seconds = quantize(options, folder)
        if status == 0:
            summary = read_json(folder / "quantized" / PROVENANCE)["summary"]
            print(report(options, config, peaks, seconds, summary))
    return status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--method", default="gptq", help="of python -m surgery")
    add("--layers", type=int, default=32)
    add("--d-model", type=int, default=4096)
    add("--d-ff", type=int, default=11008)
    add("--heads", type=int, default=32)
    add("--vocab", type=int, default=32000)
    add("--windows", type=int, default=8, help="calibration windows")
    add("--length", type=int, default=512, help="tokens of one")
    add("--folder", type=Path, help="a disk with room; else the temporary folder")
    add("more", nargs="*", help="flags of the method, after --")
    return parser.parse_args(arguments)


def write(config: ModelConfig, folder: Path) -> None:
    """A checkpoint of normal numbers in bfloat16, and text beside it; no more than a layer of one
    kernel is in memory.
    """
    rng, arrays = np.random.default_rng(0), {}
    for number, (path, leaf) in enumerate(flatten(abstract(config)).items()):
        array = np.memmap(folder / f"{number}.bin", ml_dtypes.bfloat16, "w+", shape=leaf.shape)
        rows = array.reshape(-1, leaf.shape[-1])
        step = max(1, (1 << 24) // leaf.shape[-1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            part[:] = STD * rng.standard_normal(part.shape, np.float32)
        if path.endswith("scale"):
            array[:] = 1
        array.flush()
        arrays[path] = array
    checkpoint.save(folder / "model", config, from_flat(arrays), ByteTokenizer().files())
    arrays.clear()
    for file in folder.glob("*.bin"):
        file.unlink()
    letters = rng.integers(97, 123, 1 << 20, dtype=np.uint8)
    letters[::7] = 32
    (folder / "text.txt").write_bytes(letters.tobytes())


def quantize(options: argparse.Namespace, folder: Path) -> tuple[int, dict[str, float], float]:
    """Run surgery: its exit status, peaks of its memory in bytes, and seconds."""
    text = [f"--data={folder / 'text.txt'}"]
    text += [f"--windows={options.windows}", f"--length={options.length}"]
    command = [sys.executable, "-m", "surgery", options.method, f"--checkpoint={folder / 'model'}"]
    command += [f"--out={folder / 'quantized'}", *text, *options.more]
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    peaks: dict[str, float] = {}
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    status = process.wait()
    watcher.join()
    return status, peaks, time.monotonic() - began


def watch(process: subprocess.Popen, peaks: dict[str, float]) -> None:
    """The largest values of a process's memory, ten times a second, as Linux tells them."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            found = dict(re.findall(r"^(RssAnon|VmRSS):\s+(\d+) kB", status.read_text(), re.M))
        except OSError:
            break
        for name, kilobytes in found.items():
            peaks[name] = max(peaks.get(name, 0.0), 1024.0 * int(kilobytes))
        time.sleep(0.1)


def report(
    options: argparse.Namespace,
    config: ModelConfig,
    peaks: dict[str, float],
    seconds: float,
    summary: dict[str, Any],
) -> str:
    """The figures, a line each."""
    shapes = {path: leaf.shape for path, leaf in flatten(abstract(config)).items()}
    model = sum(np.prod(shape) for shape in shapes.values())
    kernels = [s[1:] for p, s in shapes.items() if p.startswith("layers/") and len(s) == 3]
    block = 4.0 * sum(np.prod(shape) for shape in kernels)
    tokens = options.windows * options.length
    sites = 3 * config.d_model**2 + options.d_ff**2
    floor = 2.0 * tokens * (block / 4 + sites) / product_speed()
    lines = [
        f"{options.method}, {config.num_layers} layers of width {config.d_model}: "
        f"{model / 1e9:.2f}e9 parameters, {2 * model / 1e9:.2f} GB in bfloat16",
        f"a block is {block / 1e9:.2f} GB in float32",
        *(
            f"{said}: {peaks[name] / 1e9:.2f} GB, {peaks[name] / block:.1f} blocks"
            for name, said in (
                ("RssAnon", "peak of its own memory"),
                ("VmRSS", "with mapped files"),
            )
            if name in peaks
        ),
        f"{seconds:.0f} s, {seconds / config.num_layers:.1f} s a layer with reading and writing; "
        f"{summary['seconds'] / config.num_layers:.1f} s a layer for the method alone",
    ]
    if "proxy_loss" in summary:
        lines.append(f"matmul floor, {tokens:,} tokens: {floor:.1f} s a layer")
    return "\n".join([*lines, json.dumps(summary)])


def product_speed(size: int = 4096) -> float:
    """FLOP/s of a square float32 product, the best of three."""
    one = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(one, one).block_until_ready()
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        product(one, one).block_until_ready()
        taken.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(taken)


if __name__ == "__main__":
    raise SystemExit(main())
