"""The training step compiled for TPU slices that are not there, and what is read from its text."""

import dataclasses
import subprocess
import sys

import jax
import pytest

from kernels_pallas.tpu_topology import why_not
from model import ModelConfig, count_parameters
from planning.__main__ import main
from planning.compile_ahead import (
    TooLittleMemory,
    compile_training,
    memory_named,
    parse_topology,
)
from planning.compile_serving import Serving, compile_serving
from planning.hlo import collectives
from planning.plots import draw_plan
from training.command_line import parse

HLO = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}
  ROOT %c.1 = (bf16[8,8]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[2,8]) -> bf16[8,8] {
  %p.2 = bf16[2,8]{1,0} parameter(0)
  %gather.2 = bf16[8,8]{1,0} all-gather(%p.2), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}
  ROOT %c.2 = bf16[8,8] custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (t: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %t = (s32[], bf16[2,8]) parameter(0)
  %f.1 = (bf16[2,8], bf16[8,8]) fusion(%t), kind=kCustom, calls=%start
  %f.2 = bf16[8,8] fusion(%f.1), kind=kCustom, calls=%done
  %split = f32[4]{0} reduce-scatter(f32[8]{0} %x), replica_groups={{0,4},{1,5}}, to_apply=%add
  ROOT %r = (s32[], bf16[2,8]) tuple(%t)
}

%condition (t: (s32[], bf16[2,8])) -> pred[] {
  %t.2 = (s32[], bf16[2,8]) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  %i = s32[] get-tuple-element(%t.2), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[2,8]) -> bf16[2,8] {
  %x = bf16[2,8] parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %begin = s32[]{:T(128)} copy(%one)
  %first = (s32[]{:T(128)}, bf16[2,8]{1,0}) tuple(%begin, %x)
  %loop = (s32[], bf16[2,8]) while(%first), condition=%condition, body=%body
  %outer = f32[16]{0} all-reduce(%loop), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  %whole = s8[16]{0} all-reduce(%loop), channel_id=5, replica_groups=[1,8]<=[8], to_apply=%add
  %part = f32[4]{0} all-to-all(%loop), channel_id=7, replica_groups=mesh['z'=8] {'z':(4)2}
  %next = f32[4]{0} collective-permute(%loop), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %far = (f32[8]{0}, u32[], token[]) send(%outer, %token), channel_id=9, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.8_0"}
  ROOT %out = bf16[2,8] copy(%x)
}
"""


def test_exchanges_are_counted_as_often_as_loops_run_them_and_named_by_their_axes():
    found = collectives(HLO, {"data": 2, "fsdp": 4})
    assert {
        (each.kind, each.dtype, each.size, each.devices, each.axes, each.count) for each in found
    } == {
        ("all_gather", "bf16", 128.0, 4, ("fsdp",), 5),
        ("reduce_scatter", "f32", 32.0, 2, ("data",), 5),
        ("all_reduce", "f32", 64.0, 4, ("fsdp",), 1),
        ("all_reduce", "s8", 16.0, 8, ("data", "fsdp"), 1),
        ("all_to_all", "f32", 16.0, 2, ("fsdp",), 1),
        ("permute", "f32", 16.0, 2, ("fsdp",), 1),
        ("between_slices", "f32", 32.0, 2, (), 1),
    }
    assert found[0].sent == 5 * 128 * 3 / 4
    (far,) = (each for each in found if each.kind == "between_slices")
    assert far.part_of == "all_reduce"
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("HloModule empty", {"data": 1})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-128", "write generation:AxBxC"),
        ("v5q:2x2", "nearest: v5p"),
        ("v5e:2x2x2", "v5e has 2 axes, not 3"),
    ],
)
def test_wrong_topologies_are_named(name, said):
    with pytest.raises(ValueError, match=said):
        parse_topology(name)


@pytest.mark.parametrize(
    "words",
    [
        "the total memory required for HLO temporaries (23.75G) exceeds available HBM (15.75G).",
        "Ran out of memory in memory space hbm. Used 23.75G of 15.75G hbm. Exceeded hbm capacity",
    ],
)
def test_memory_that_runs_out_is_told_in_numbers(words):
    with (
        pytest.raises(TooLittleMemory, match=r"takes 23.8 GiB of a device's 15.8 GiB, 8.0 GiB too"),
        memory_named(),
    ):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {words}")
    with pytest.raises(jax.errors.JaxRuntimeError, match="other"), memory_named():
        raise jax.errors.JaxRuntimeError("INTERNAL: other")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"what": "decoding"}, "what='decoding': no such one; nearest: decode"),
        ({"weights": "int5"}, "weights='int5': no such one; nearest: int"),
        ({"batch": 0}, "batch=0; at least 1"),
    ],
)
def test_wrong_serving_is_named(fields, said):
    with pytest.raises(ValueError, match=said):
        Serving(**fields)


tpu = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def tiny(**mesh):
    flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    flags.append("--config.optimizer.name=adamw")
    config = parse(["--config=configs/quickstart.py", *flags]).config
    model = ModelConfig(vocab_size=256, d_model=128, num_layers=3, num_heads=2, d_ff=256)
    data = dataclasses.replace(config.data, batch_size=8, length=128)
    return dataclasses.replace(config, model=model, data=data)


@tpu
@pytest.mark.tpu_aot
def test_a_step_compiles_and_gathers_each_layer_forward_and_backward(tmp_path):
    plan = compile_training(tiny(data=1, fsdp=4), parse_topology("v5e:2x2"))
    assert plan.mesh == {"data": 1, "fsdp": 4, "expert": 1, "stage": 1, "context": 1, "tensor": 1}
    parameters = count_parameters(tiny().model)
    assert plan.parameters == pytest.approx(4 * parameters / 4, rel=0.02)
    assert plan.optimizer == pytest.approx(8 * parameters / 4, rel=0.02)
    gathers = [each for each in plan.collectives if each.kind == "all_gather" and each.size > 2**14]
    assert gathers
    assert all(each.axes == ("fsdp",) for each in gathers)
    gate = sum(each.count for each in gathers if each.size in (2 * 128 * 256, 4 * 128 * 256))
    assert gate >= 3 * 3  # gate, up and down of three layers at the least
    assert plan.fits
    assert 0 < plan.utilization(plan.serial_seconds) <= plan.utilization(plan.overlapped_seconds)
    draw_plan(tmp_path / "plan.png", plan, "tiny")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@tpu
@pytest.mark.tpu_aot
def test_what_cannot_fit_is_told_by_how_much_and_what_would(capsys, monkeypatch):
    config = tiny(data=1, fsdp=4)
    huge = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=2**18))
    monkeypatch.setattr("planning.__main__._config", lambda path, flags: huge)
    assert main(["compile", "--config=configs/quickstart.py", "--topology=v5e:2x2"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "of a device's 15.8 GiB" in said
    assert "GiB too much" in said
    assert "this would fit: --config.mesh." in said


@tpu
@pytest.mark.tpu_aot
def test_the_plans_of_a_search_are_compiled(capsys, monkeypatch):
    def config(path, flags):
        sizes = [flag.removeprefix("--config.mesh.").split("=") for flag in flags]
        return tiny(**{"data": 1, **{axis: int(n) for axis, n in sizes if "." not in axis}})

    monkeypatch.setattr("planning.__main__._config", config)
    asked = ["search", "--config=configs/quickstart.py", "--topology=v5e:2x2", "--verify=1"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    first = said.partition("the first: ")[2].split(" --config.train")[0]
    assert f"the first of these: {first}" in said
    assert main([*asked[:2], "--topology=2*v5e:2x2", "--verify=1"]) == 2


@tpu
@pytest.mark.tpu_aot
@pytest.mark.filterwarnings("ignore:append. the plain function runs:UserWarning")  # as it serves
@pytest.mark.parametrize(("what", "weights"), [("decode", "bfloat16"), ("prefill", "int8")])
def test_the_engines_step_compiles_with_its_pages_and_packed_weights(what, weights):
    config = tiny(data=1, tensor=4)
    model = dataclasses.replace(config.model, num_layers=2, num_heads=4, head_dim=128)
    config = dataclasses.replace(config, model=model)
    serving = Serving(what, batch=16, context=256, chunk=64, weights=weights)
    plan = compile_serving(config, parse_topology("v5e:2x2"), serving)
    model = model.resolve()
    tokens, width = 16 * 256, 2 * model.kv_heads * model.head_dim * 2
    assert plan.cache == 2 * tokens * width / 4  # layers, quarters of the heads
    outside = 2 * model.vocab_size * model.d_model
    layers = count_parameters(model) - outside
    each = {"bfloat16": 2, "int8": 1}[weights]
    assert plan.parameters == pytest.approx((2 * outside + each * layers) / 4, rel=0.05)
    assert plan.tokens == (16 if what == "decode" else 64)
    sums = [each for each in plan.collectives if each.kind == "all_reduce" and each.dtype == "bf16"]
    assert sum(each.count for each in sums) >= 2 * 2  # attention and feed-forward of two layers
    assert plan.fits
    assert plan.seconds > 0


@tpu
@pytest.mark.tpu_aot
@pytest.mark.slow
def test_the_command_says_whether_it_fits(tmp_path):
    command = [sys.executable, "-m", "planning", "compile", "--config=configs/quickstart.py"]
    wrong = [*command, "--topology=v5e:2x2", "--config.mesh.fsdp=3", "--config.mesh.data=1"]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "does not fit 4 devices" in done.stderr
