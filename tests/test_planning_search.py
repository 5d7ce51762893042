"""Meshes that are found are legal for a run, fit, and are ranked as the closed forms say."""

import dataclasses
import math

import pytest

from model import ModelConfig
from planning.__main__ import main
from planning.hardware import HARDWARE
from planning.memory import Split, training_memory
from planning.search import Cluster, Run, legal_splits, search, step_time
from sharding import MeshConfig, PipelineConfig, pipeline_schedule

LLAMA2_7B = ModelConfig(vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, d_ff=11008)
RUN = Run(LLAMA2_7B.resolve(), batch=256, length=4096)
MIXTURE = dataclasses.replace(LLAMA2_7B, num_layers=4, feed_forward="experts", num_experts=6)


@pytest.mark.parametrize("model", [LLAMA2_7B, MIXTURE])
def test_every_mesh_divides_devices_heads_widths_experts_and_batch(model):
    run = dataclasses.replace(RUN, model=model.resolve(), batch=384)
    found = list(legal_splits(run, 48))
    assert len(found) == len(set(found)) > 5
    for split in found:
        axes = {
            axis: getattr(split, axis) for axis in ("data", "fsdp", "expert", "context", "tensor")
        }
        assert math.prod(axes.values()) == 48 == split.devices
        MeshConfig(**axes).sizes(48)
        assert run.batch % (split.data * split.fsdp * split.expert) == 0
        assert 32 % split.tensor == 0
        assert split.expert in ((1, 2, 3, 6) if model is MIXTURE else (1,))
        assert split.stage == 1


def test_the_best_plans_fit_and_come_first():
    found = search(RUN, Cluster(HARDWARE["h100"], 64), top=20)
    seconds = [each.time.seconds for each in found]
    assert seconds == sorted(seconds)
    assert all(each.memory.total <= 0.9 * 80e9 for each in found)
    assert all(0 < each.utilization <= 1 for each in found)
    # A 7B model on fast links needs no tensor parallelism, whose sums nothing can hide.
    assert found[0].split.tensor == 1
    assert found[0].time.exposed == 0


def test_a_closed_form_by_hand():
    cluster = Cluster(dataclasses.replace(HARDWARE["h100"], latency_seconds=0), 8)
    time = step_time(RUN, cluster, Split(data=8), remat=False)
    size = 4 * 6738415616
    assert time.hidden == pytest.approx(2 * 7 / 8 * size / 450e9, rel=1e-4)
    assert time.bubble == time.exposed == 0
    piped = step_time(RUN, cluster, Split(data=2, stage=4), accumulation=16, remat=False)
    sent = 2 * 256 / 2 / 16 * 4096 * 4096
    assert piped.exposed == pytest.approx(16 * 2 * sent / 450e9)
    assert piped.bubble == pytest.approx(3 / 16 * (piped.compute + piped.exposed))
    counted = pipeline_schedule(PipelineConfig(), 4, 16).bubble
    assert piped.bubble / piped.seconds == pytest.approx(counted)


def test_axes_that_leave_the_fast_links_are_slower():
    split = Split(data=1, fsdp=16)
    slow = step_time(RUN, Cluster(HARDWARE["h100"], 16), split)
    wide = dataclasses.replace(HARDWARE["h100"], domain=72)
    assert step_time(RUN, Cluster(wide, 16), split).hidden < slow.hidden / 5


def test_what_cannot_fit_is_told_with_what_would(capsys):
    with pytest.raises(ValueError, match=r"takes [\d.]+ GiB of 13.4 GiB a device; about \d+"):
        search(dataclasses.replace(RUN, batch=8), Cluster(HARDWARE["tpu-v5e"], 4))
    with pytest.raises(ValueError, match="a batch that is a multiple of 7"):
        search(RUN, Cluster(HARDWARE["h100"], 7))
    flags = ["--config=configs/llama2_7b.py", "--config.data.batch_size=256"]
    assert main(["search", "--hardware=h100", "--devices=64", "--top=2", *flags]) == 0
    assert "the first: --config.mesh." in capsys.readouterr().out
    assert main(["search", "--hardware=h10", "--devices=64", *flags]) == 2
    assert "not in the table" in capsys.readouterr().err
    assert main(["search", "--hardware=h100", "--devices=64", "--verify=1", *flags]) == 2
    assert "or --topology (also to --verify)" in capsys.readouterr().err


def test_pipelines_are_those_that_training_runs():
    run = dataclasses.replace(RUN, batch=384, stages=True)
    assert {split.stage for split in legal_splits(run, 48)} == {1, 2, 4, 8, 16}
    unequal = dataclasses.replace(LLAMA2_7B, layer_overrides=((0, "d_ff", 4096),))
    run = dataclasses.replace(run, model=unequal.resolve())
    assert {split.stage for split in legal_splits(run, 48)} == {1}


def test_memory_of_a_pipeline_is_what_its_schedule_keeps():
    split = Split(stage=4, fsdp=2, zero=0)
    alike = {"micro_batch": 1, "length": 4096, "remat": True}
    one = training_memory(RUN.model, split, **alike)
    outside = 2 * 32000 * 4096 + 4096
    assert one.weights == pytest.approx(2 * ((6738415616 - outside) / 4 + outside) / 2)
    for name, held in (("gpipe", 8 * (16 + 3)), ("1f1b", 8 + 7)):
        schedule = pipeline_schedule(PipelineConfig(name), 4, 16)
        memory = training_memory(RUN.model, split, schedule=schedule, **alike)
        one_input = 2 * 4096 * 4096
        assert memory.activations - one.activations == (held - 8) * one_input
        assert max(schedule.kept()) <= held
