"""What installing and importing Sheaf costs: few dependencies, no work before it is asked for."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = (
    *("kernels_pallas", "sandbox", "weights", "sharding", "model", "data"),
    *("training", "surgery", "serving", "evals", "planning", "configs"),
)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_base_install_has_few_dependencies_and_no_second_framework():
    names = [line.split(">")[0].split("[")[0] for line in project()["project"]["dependencies"]]
    assert len(names) < 15
    assert not {"torch", "tensorflow", "transformers", "keras"} & set(names)


def test_every_room_is_installed():
    include = project()["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.removesuffix("*") for pattern in include} == set(ROOMS)
    assert all((ROOT / room / "__init__.py").is_file() for room in ROOMS)


def test_importing_everything_starts_no_device_and_pulls_in_no_second_framework():
    code = (
        f"import sys, train, {', '.join(ROOMS)}\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
        "heavy = {'torch', 'tensorflow', 'transformers', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_of_a_room_exists():
    code = "\n".join(f"from {room} import *" for room in ROOMS)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
