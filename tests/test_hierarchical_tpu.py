"""The bytes between two TPU slices, read from steps compiled for them, against the closed forms."""

import pytest

from kernels_pallas.tpu_topology import why_not
from model import count_parameters
from planning.compile_ahead import compile_training, parse_topology
from training import default_config, run_config

FAST, SLICES, MICRO = 4, 2, 4
ALL = (("d_model", ("fsdp", "data")),)
FEW = (("d_model", ("fsdp",)),)
HALF = {"gather": "bfloat16", "reduce": "bfloat16"}
KEPT = {"weights": ALL, "secondary": ("fsdp",)}
LEVELS = {"weights": FEW, "optimizer": ALL}
CASES = {
    "zero 3": ({"weights": ALL, **HALF}, 2 * MICRO, MICRO),
    "secondary": ({**KEPT, **HALF}, MICRO, MICRO),
    "secondary, int8 weights": ({**KEPT, **HALF, "gather": "int8"}, MICRO / 2, MICRO),
    "zero++": ({**KEPT, "gather": "int8", "reduce": "int4"}, MICRO / 2, MICRO / 4),
    "three levels": ({**LEVELS, **HALF}, 1, 1),
}
"""Scheme -> (fields of `sharding`, gathers and reductions of bfloat16 arrays in a step)."""


def _config(sharding):
    config = default_config()
    with config.ignore_type():
        config.model.vocab_size = 256
        config.model.d_model = 256
        config.model.num_layers = 2
        config.model.num_heads = config.model.kv_heads = 2
        config.model.d_ff = 1024
        config.data.path = "none"
        config.data.length = 128
        config.data.batch_size = FAST * SLICES * MICRO
        config.train.accumulation = MICRO
        config.train.remat = "full"
        config.train.compute_dtype = "bfloat16"
        config.mesh.data, config.mesh.fsdp = SLICES, FAST
        for name, value in sharding.items():
            config.sharding[name] = value
    return run_config(config)


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "libtpu compiles here")
def test_bytes_between_slices_fall_as_the_closed_forms_say():
    crossed, topology = {}, parse_topology("v5e:2x2", SLICES)
    for name, (sharding, gathers, reductions) in CASES.items():
        config = _config(sharding)
        plan = compile_training(config, topology)
        size = 2 * count_parameters(config.model.resolve())
        # A gather sends each device's shard of what its slice holds, a reduction's buffer holds
        # also what stays.
        expected = size / FAST * (gathers * (SLICES - 1) / SLICES + reductions)
        between = [each for each in plan.collectives if each.kind == "between_slices"]
        crossed[name] = sum(each.size * each.count for each in between)
        assert crossed[name] == pytest.approx(expected, rel=0.15), name
        dtypes = {each.dtype for each in between if each.size * each.count > expected / 10}
        assert dtypes == {
            {"bfloat16": "bf16", "int8": "s8", "int4": "s4"}[config.sharding.gather],
            {"bfloat16": "bf16", "int8": "s8", "int4": "s4"}[config.sharding.reduce],
        }
        state = 12 * count_parameters(config.model.resolve()) / (FAST * SLICES)
        assert plan.parameters + plan.optimizer == pytest.approx(state, rel=0.05)
    assert list(crossed.values()) == sorted(crossed.values(), reverse=True)
