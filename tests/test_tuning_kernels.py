"""Every kernel that can be tuned: its candidates, that it takes them, and the tables that ship."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.bit_planes import tpu as planes_tpu
from kernels_pallas.int8_matmul import tpu as int8_tpu
from kernels_pallas.int8_matmul import tpu_quantizer
from kernels_pallas.tuning import use
from kernels_pallas.tuning.kernels import KERNELS
from kernels_pallas.tuning.key import code_version
from kernels_pallas.tuning.store import read, shipped_file

TABLES = Path(__file__).parent.parent / "kernels_pallas" / "tuning" / "tables"


@pytest.mark.parametrize("name", KERNELS)
def test_candidates_have_the_names_and_keys_of_their_kernel(name):
    kernel = KERNELS[name]
    for sizes in kernel.shapes.values():
        for one in kernel.keys(sizes, "cpu"):
            default, tried = kernel.default(one), kernel.candidates(one)
            assert one.kernel == name
            assert code_version(name)
            assert {frozenset(blocks) for blocks in tried} == {frozenset(default)}


@pytest.mark.parametrize("name", [name for name in KERNELS if KERNELS[name].platform == "cpu"])
def test_a_kernel_takes_its_sizes_from_the_look_up(name):
    kernel = KERNELS[name]
    one = kernel.keys(next(iter(kernel.shapes.values())), "cpu")[0]
    made, texts = kernel.case(one), set()
    for blocks in kernel.candidates(one):
        with use({name: blocks}):
            texts.add(jax.jit(made.function).lower(*made.arguments).as_text())
    assert len(texts) == len(kernel.candidates(one))


def int8_product(x, w):
    ones = jnp.ones(len(x)), jnp.ones(w.shape[-1])
    return int8_tpu.int8_matmul(x, w, *ones, generation="v5e", dtype=jnp.float32)


@pytest.mark.parametrize(
    ("name", "sizes", "call", "kinds"),
    [
        ("int8_matmul.tpu", {}, int8_product, (jnp.int8, jnp.int8)),
        (
            "int8_matmul.tpu_quantizer",
            {},
            lambda x: tpu_quantizer.quantize_rows(x, None, generation="v5e"),
            (jnp.bfloat16,),
        ),
        (
            "bit_planes.tpu",
            {"bits": 2},
            lambda x, planes: planes_tpu.matmul(x, planes, "signed", generation="v5e"),
            (jnp.int8, jnp.uint32),
        ),
    ],
    ids=["product", "quantizer", "planes"],
)
def test_an_integer_kernel_on_a_tpu_takes_its_sizes_from_the_look_up(name, sizes, call, kinds):
    """Traced, which needs no TPU."""
    w = (2, 256, 2048) if "bits" in sizes else (8192, 2048)
    arrays = [jax.ShapeDtypeStruct(*one) for one in zip(((512, 8192), w), kinds, strict=False)]
    sizes = {"m": 512, "columns": 2048, "rows": 8192} | sizes
    known = {size: sizes[size] for size in next(iter(KERNELS[name].shapes.values()))}
    tried = KERNELS[name].candidates(KERNELS[name].keys(known, "TPU v5 lite")[0])
    texts = set()
    for blocks in tried:
        with use({name: blocks}):
            texts.add(str(jax.make_jaxpr(call)(*arrays)))
    assert len(texts) == len(tried)
    with use({name: {"input_rows": 40}}), pytest.raises(ValueError, match="do not fit"):
        jax.make_jaxpr(call)(*arrays)


def test_shipped_tables_are_of_the_code_at_hand():
    for path in TABLES.glob("*.json"):
        held = json.loads(path.read_text())
        table = read(path)
        assert table, path
        assert path.name == shipped_file(held["device_kind"]).name
        for one, made in table.items():
            assert made.code == code_version(one.kernel), (
                f"{path.name}: the code of {one.kernel} has changed since {one} was measured; "
                f"tune it again with --table={path} or take its choices out"
            )
            assert made.source in ("measured", "compiled")
            assert made.blocks.keys() == KERNELS[one.kernel].default(one).keys()
