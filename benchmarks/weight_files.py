"""How fast weight folders are read and written, and what memory that takes.

    python benchmarks/weight_files.py [--mib=256] [--folder=/a/disk] [--repeats=3]

Eight random bfloat16 matrices of 4096 columns. Rates are MB/s of what is read or written, the best
of a few rounds in which the rows take turns: from the page cache, and from the disk (after the
kernel was asked to forget the file; writes are flushed). "Own" is how much the process's own memory
has grown once an array is there (RssAnon), "peak" the most it grew by while that was read, pages of
mapped files included, which the kernel may drop. The safetensors library has its rows where it is
installed.
"""

from __future__ import annotations

import argparse
import ctypes
import operator
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from model.families.reader import open_weights
from model.families.writer import write_weights

COLUMNS, TENSORS = 4096, 8
Job = Callable[[], Iterator[Any]]
"""Gives what it reads or writes, array by array."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    known = parser.parse_args()
    if known.mib < 1:
        parser.error(f"--mib={known.mib}: at least 1")
    with tempfile.TemporaryDirectory(dir=known.folder) as name:
        folder = Path(name)
        arrays = matrices(known.mib)
        size = next(iter(arrays.values())).nbytes / 2**20
        writing = rates(writers(folder, arrays), known.repeats)
        write(folder / "weights", arrays)
        del arrays
        file = folder / "weights" / "model.safetensors"
        jobs = readers(file)
        warm = rates(jobs, known.repeats)
        cold = rates(jobs, known.repeats, before=lambda: forget(file))
        grown = {name: memory(job) for name, job in jobs.items()}
    print(f"{known.mib} MiB in {TENSORS} arrays of {size:.1f} MiB")
    print("| | from the page cache, MB/s | from or to the disk, MB/s | own, MiB | peak, MiB |")
    print("|---|---|---|---|---|")
    for name, (own, peak) in grown.items():
        print(f"| {name} | {warm[name]:,.0f} | {cold[name]:,.0f} | {own:.1f} | {peak:.1f} |")
    for name, rate in writing.items():
        print(f"| {name} | | {rate:,.0f} | | |")


def matrices(mib: int) -> dict[str, np.ndarray]:
    shape = TENSORS, mib * 2**20 // (TENSORS * COLUMNS * 2), COLUMNS
    values = np.random.default_rng(0).integers(0, 2**16, shape, dtype=np.uint16)
    return {f"layers.{n}.weight": values[n].view(ml_dtypes.bfloat16) for n in range(TENSORS)}


def write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    write_weights(folder, [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()])


def writers(folder: Path, arrays: dict[str, np.ndarray]) -> dict[str, Job]:
    def ours() -> Iterator[Any]:
        shutil.rmtree(folder / "new", ignore_errors=True)
        write(folder / "new", arrays)
        yield from arrays.values()

    def theirs() -> Iterator[Any]:
        from safetensors.numpy import save_file

        path = folder / "new.safetensors"
        path.unlink(missing_ok=True)
        save_file(arrays, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        yield from arrays.values()

    jobs: dict[str, Job] = {"write_weights": ours}
    return jobs | {"safetensors save_file, flushed": theirs} if has_safetensors() else jobs


def readers(file: Path) -> dict[str, Job]:
    every, half = slice(None), slice(COLUMNS // 2)
    eighth = slice(COLUMNS // 8, COLUMNS // 4)
    jobs: dict[str, Job] = {
        "plain read": lambda: plain_read(file),
        "whole arrays": lambda: ours(file, (every,)),
        "half of the columns": lambda: ours(file, (every, half)),
        "an eighth of the columns": lambda: ours(file, (every, eighth)),
    }
    if has_safetensors():
        jobs["safetensors, whole arrays"] = lambda: theirs(file, (every,))
        jobs["safetensors, an eighth"] = lambda: theirs(file, (every, eighth))
    return jobs


def plain_read(file: Path) -> Iterator[Any]:
    """What the disk gives: new memory for each array, filled by one call."""
    size = file.stat().st_size // TENSORS
    with open(file, "rb", buffering=0) as stream:
        for _ in range(TENSORS):
            buffer = np.empty(size, np.uint8)
            stream.readinto(buffer.data)
            yield buffer
            del buffer


def ours(file: Path, index: tuple[slice, ...]) -> Iterator[Any]:
    with open_weights(file.parent) as files:
        for name in files.tensors:
            yield files.read(name, index)


def theirs(file: Path, index: tuple[slice, ...]) -> Iterator[Any]:
    from safetensors import safe_open

    with safe_open(file, "np") as files:
        for name in files.offset_keys():
            yield files.get_slice(name)[index]


def has_safetensors() -> bool:
    try:
        import safetensors  # noqa: F401
    except ImportError:
        return False
    return True


def forget(file: Path) -> None:
    """Ask the kernel to drop a file's pages."""
    with open(file, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rates(
    jobs: dict[str, Job], repeats: int, before: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """`{job: MB/s}`, the best of the rounds."""
    best = dict.fromkeys(jobs, 0.0)
    for _ in range(repeats):
        for name, job in jobs.items():
            before()
            start = time.perf_counter()
            size = sum(map(operator.attrgetter("nbytes"), job()))
            best[name] = max(best[name], size / (time.perf_counter() - start) / 1e6)
    return best


def memory(job: Job) -> tuple[float, float]:
    """MiB by which the process's own memory, and its peak, grow over all arrays."""
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # freed memory goes back
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    first = status("RssAnon"), status("VmRSS")
    own = [0.0]
    for array in job():
        own.append(status("RssAnon") - first[0])
        del array
    return max(own), status("VmHWM") - first[1]


def status(field: str) -> float:
    """MiB of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
