"""Compiled programs on disk, in their final form, and what they are found by.

JAX's own cache keeps what the compiler makes, but finds it only by a program that was traced and
lowered, which for a deep model takes longer than to read it. Here a program is found by what it is
made of: the code of the rooms below, the versions, the device, and all static arguments and shapes.
So an engine that starts again, after a kill too, is ready about when its weights are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from kernels_pallas.tuning.store import cache_file

ROOMS = ("kernels_pallas", "weights", "sharding", "model", "serving")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
CONFIG = ("enable_x64", "default_matmul_precision", "default_prng_impl", "threefry_partitionable")
"""JAX's settings that change a program, each after `jax_`."""
MOST_BYTES = 4 << 30
"""Most that programs take on disk; the ones that were read longest ago go first."""
logger = logging.getLogger(__name__)


class ProgramStore:
    """The programs of one kind of engine.

    folder: where they lie; None keeps nothing. devices: that they run on. told: all that decides
    what they are beside the code and the machine; what is told of one must name the rest.
    """

    def __init__(self, folder: Path | None, devices: Sequence[Any], told: Sequence[Any]) -> None:
        self._folder, self._devices = folder, list(devices)
        self._made_of = "" if folder is None else f"{surroundings(devices[0])} {told}"

    @classmethod
    def beside_jax(cls, devices: Sequence[Any], told: Sequence[Any]) -> ProgramStore:
        """In the folder of JAX's own cache, if it has one on a disk."""
        folder = _configured("compilation_cache_dir")
        if folder is None or "://" in folder:
            return cls(None, devices, told)
        return cls(Path(folder) / "programs", devices, told)

    @contextlib.contextmanager
    def without_jaxs(self) -> Iterator[None]:
        """Compile anew what is to be kept: a program for a CPU that comes from JAX's cache lacks
        functions when it is written again. Other threads have no cache meanwhile either.
        """
        if self._folder is None or not _configured("enable_compilation_cache"):
            yield
            return
        _use_jaxs(False)
        try:
            yield
        finally:
            _use_jaxs(True)

    def get(self, told: Any) -> Any:
        """The program, or None. One that cannot be read is as if it were not there."""
        path = self._path(told)
        if path is None or not path.exists():
            return None
        try:
            content, trees = pickle.loads(path.read_bytes())
            found = serialize_executable.deserialize_and_load(
                content, *trees, execution_devices=self._devices
            )
            os.utime(path)
        except Exception as error:  # Whatever a damaged file or another library raises.
            logger.warning("%s cannot be read, so it is compiled again: %s", path, error)
            return None
        return found

    def put(self, told: Any, program: Any) -> None:
        """Keep a program, in one piece or not at all; a full disk only costs the next start."""
        path = self._path(told)
        if path is None:
            return
        part = path.with_suffix(f".{secrets.token_hex(4)}.part")
        try:
            content, *trees = serialize_executable.serialize(program)
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(pickle.dumps((content, trees)))
            part.replace(path)
            drop_oldest(path.parent, MOST_BYTES)
        except Exception as error:  # Not every program can be written; the engine has it.
            logger.warning("a program is not kept at %s: %s", path, error)
            part.unlink(missing_ok=True)

    def drop(self, told: Any, error: Exception) -> bool:
        """Delete a program that does not run; false if it is not there."""
        path = self._path(told)
        if path is None or not path.exists():
            return False
        logger.warning("%s does not run, so it is compiled again: %s", path, error)
        path.unlink(missing_ok=True)
        return True

    def _path(self, told: Any) -> Path | None:
        if self._folder is None:
            return None
        name = hashlib.sha256(f"{self._made_of} {told}".encode()).hexdigest()
        return self._folder / f"{name}.program"


def _configured(name: str) -> Any:
    return getattr(jax.config, f"jax_{name}")


def _use_jaxs(used: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", used)
    compilation_cache.reset_cache()  # It asks for the setting once.


def drop_oldest(folder: Path, most: int) -> None:
    """Delete the programs that were read longest ago, until the rest has at most so many bytes."""
    files = [(path, path.stat()) for path in folder.glob("*.program")]
    total = sum(stat.st_size for _, stat in files)
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime):
        if total <= most:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size


def shapes_of(tree: Any) -> str:
    """Shapes, types and places of the arrays of a tree, and its structure, as text."""
    leaves, structure = jax.tree.flatten(tree)
    told = [f"{leaf.dtype}{leaf.shape}{getattr(leaf, 'sharding', '')}" for leaf in leaves]
    return f"{told} {structure}"


def surroundings(device: Any) -> str:
    """All outside an engine that a program depends on, as text."""
    return str(
        (
            (jax.__version__, jaxlib.__version__, device.client.platform_version),
            (device.device_kind, jax.device_count(), jax.process_index(), _processor()),
            [os.environ.get(name) for name in FLAGS],
            [_configured(name) for name in CONFIG],
            _digest([cache_file(device.device_kind)]),
            code(),
        )
    )


@functools.cache
def code() -> str:
    """A hash of the files of the rooms that a step is made of."""
    root = Path(__file__).parent.parent
    kinds = ("*.py", "*.json")
    return _digest(path for room in ROOMS for kind in kinds for path in (root / room).rglob(kind))


def _digest(paths: Any) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes() if path.exists() else b""
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


@functools.cache
def _processor() -> str:
    """The instructions that this machine's processor has, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
