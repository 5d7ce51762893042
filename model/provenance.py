"""Where a checkpoint comes from: parents, method, settings, code, libraries, devices, time."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
ROOT = Path(__file__).resolve().parent.parent


def provenance(
    method: str,
    settings: Mapping[str, Any] | None = None,
    parents: Sequence[str] = (),
    code: Path = ROOT,
) -> dict[str, Any]:
    """The content of `provenance.json`, as JSON.

    `method` made the model ("train", "quantize"), with `settings`, from the checkpoints `parents`.
    """
    return {
        "method": method,
        "parents": [str(parent) for parent in parents],
        "settings": dict(settings or {}),
        "code": code_revision(code),
        "libraries": library_versions(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": devices(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def code_revision(folder: Path = ROOT) -> dict[str, Any]:
    """`{"revision": hash, "dirty": bool}` of a git checkout; both None where there is none."""
    revision = _git(folder, "rev-parse", "HEAD")
    if revision is None:
        return {"revision": None, "dirty": None}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision, "dirty": bool(changes)}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide numbers, those that are installed."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def devices() -> dict[str, Any]:
    """Kind and number of devices, and number of processes."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return {"kind": ", ".join(kinds), "count": jax.device_count(), "processes": jax.process_count()}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
