"""What crosses the slow network between clusters: bytes, the choice, and the compiler's word."""

import dataclasses
import json

import pytest

from kernels_pallas.tpu_topology import why_not
from model import ModelConfig, count_parameters
from planning.__main__ import main
from planning.clusters import Job, Site, Sites, choose, data_plans, read_sites, stage_plan
from planning.compile_ahead import compile_training, parse_topology
from planning.hardware import HARDWARE
from sharding import Cluster
from training.command_line import parse

MODEL = ModelConfig(vocab_size=64, d_model=128, num_layers=8, num_heads=2, d_ff=256, max_length=128)
JOB = Job(MODEL.resolve(), batch=64, length=128, remat=False)


def _sites(*hosts, speeds=(1.0, 1.0), device="tpu-v5e", each=4):
    sites = (
        Site(Cluster(f"c{index}", count, 1e9, speed), HARDWARE[device], each)
        for index, (count, speed) in enumerate(zip(hosts, speeds, strict=True))
    )
    return Sites(tuple(sites), between=1e9)


def test_bytes_over_the_slow_network_are_those_of_the_closed_forms():
    plan = stage_plan(JOB, _sites(1, 1), 2, 16)
    assert plan.messages == 2 * 17 * (64 // 16) * 128 * 128 * 2
    assert plan.sums == 2 * 4 * (2 * 64 * 128 + 128)
    assert plan.network == pytest.approx((plan.messages / 2 + plan.sums / 2) / 1e9)
    (data,) = {plan.sums for plan in data_plans(JOB, _sites(1, 1))}
    assert data == 2 * 4 * count_parameters(MODEL)
    three = stage_plan(dataclasses.replace(JOB, tensor=2), _sites(1, 1, 2, speeds=(1, 1, 2)), 4, 16)
    assert three.messages == 2 * 19 * (64 // 16) * 128 * 128 * 2 * 2 * 2
    assert three.clusters == ("c0", "c1", "c2", "c2")
    assert three.layers == (1, 1, 3, 3)


def test_the_axis_that_sends_less_is_chosen_and_flips_with_the_batch():
    axis, plans = choose(JOB, _sites(1, 1))
    assert axis == "stage"
    assert plans["stage"].sent < plans["data"].sent
    axis, plans = choose(dataclasses.replace(JOB, batch=512), _sites(1, 1))
    assert axis == "data"
    assert plans["data"].sent < plans["stage"].sent


def test_layers_follow_speeds_and_shorten_the_slowest_stage():
    job = dataclasses.replace(JOB, model=dataclasses.replace(MODEL, num_layers=48).resolve())
    plan = stage_plan(job, _sites(1, 1, speeds=(1.18, 1.0)), 2, 16)
    assert plan.layers == (26, 22)
    assert plan.compute == pytest.approx(17 * (64 / 16 / 4) * 3 * 26 / 1.18)
    assert plan.compute_equal == pytest.approx(plan.compute * 24 / (26 / 1.18))


def test_what_cannot_be_laid_is_told_with_what_would():
    with pytest.raises(ValueError, match="a batch of 8 sequences, or a multiple, does"):
        choose(dataclasses.replace(JOB, batch=3), _sites(1, 1))
    with pytest.raises(ValueError, match=r"tensor x context = 3 does not divide .* 4 devices"):
        choose(dataclasses.replace(JOB, tensor=3), _sites(1, 1))
    large = dataclasses.replace(MODEL, d_model=16384, num_heads=64, num_layers=80)
    with pytest.raises(ValueError, match=r"takes [\d.]+ GiB of 13.4 GiB"):
        choose(dataclasses.replace(JOB, model=large.resolve()), _sites(1, 1))


ROW = {"name": "a", "hosts": 2, "devices": 8, "hardware": "h100", "link": 5e10}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"clusters": []}, 'write {"between"'),
        ({"between": 0, "clusters": []}, "between is 0; a number above 0"),
        ({"between": 1e9, "clusters": [ROW]}, "1 clusters; at least 2"),
        ({"between": 1e9, "clusters": [ROW, {**ROW, "speed": 2}]}, "to every cluster or to none"),
        ({"between": 1e9, "clusters": [ROW, {"name": "b"}]}, r"clusters\[1\] lacks hosts, devices"),
        ({"between": 1e9, "clusters": [ROW, {**ROW, "host": 2}]}, r"clusters\[1\].host is unknown"),
        ({"between": 1e9, "clusters": [ROW, {**ROW, "hosts": "2"}]}, "hosts is '2'; a number"),
        ({"between": 1e9, "clusters": [ROW, {**ROW, "hardware": "h10"}]}, "not in the table"),
    ],
)
def test_files_that_describe_no_clusters_are_refused_by_field(tmp_path, given, said):
    path = tmp_path / "clusters.json"
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=said):
        read_sites(path, JOB)


def test_the_command_says_what_crosses_and_how_to_train_so(tmp_path, capsys):
    path, out = tmp_path / "clusters.json", tmp_path / "plans.json"
    slow = {**ROW, "name": "b", "hardware": "a100-80g"}
    path.write_text(json.dumps({"between": 3e9, "clusters": [ROW, slow]}))
    flags = ["--config=configs/llama2_7b.py", "--config.data.batch_size=256"]
    assert main(["clusters", f"--clusters={path}", f"--json={out}", *flags]) == 0
    said = capsys.readouterr().out
    assert "stage over the slow network sends least" in said
    plan = json.loads(out.read_text())["stage"]
    fast, slowest = plan["layers"]
    assert fast > 2 * slowest  # an H100 is 3.2 times an A100
    arguments = said.split("train.py: ")[1].strip()
    clusters = arguments.split("--config.clusters=")[1].strip('"')
    config = parse([*flags, *arguments.split()[:7], f"--config.clusters={clusters}"]).config
    assert (config.mesh.stage, config.train.pipeline.outside) == (2, "repeated")
    assert config.train.pipeline.layers == (fast, slowest)
    assert [cluster.name for cluster in config.clusters] == ["a", "b"]


def _compiled(**settings):
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in settings.items()]
    flags += ["--config.optimizer.name=adamw", "--config.train.compute_dtype=bfloat16"]
    config = parse(["--config=configs/quickstart.py", *flags]).config
    data = dataclasses.replace(config.data, batch_size=JOB.batch, length=JOB.length)
    clusters = (Cluster("a", 1), Cluster("b", 1))
    config = dataclasses.replace(config, model=MODEL, data=data)
    if config.mesh.stage > 1:
        config = dataclasses.replace(config, clusters=clusters)
    plan = compile_training(config, parse_topology("2*v5e:2x2"))
    found = [each for each in plan.collectives if each.kind == "between_slices"]
    return {
        kind: sum(each.size * each.count for each in found if each.part_of == kind)
        for kind in {each.part_of for each in found}
    }


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_compiled_for_two_slices_a_step_sends_what_was_predicted():
    sites = _sites(1, 1, speeds=(3.0, 5.0))
    pipeline = {"outside": "repeated", "layers": "3,5"}
    pipeline = {f"train__pipeline__{name}": value for name, value in pipeline.items()}
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__stage": 2}
    staged = _compiled(train__accumulation=16, **mesh, **pipeline)
    # Of each message one slice's devices send and the other's receive.
    messages = staged.pop("permute") * 4
    plan = stage_plan(JOB, sites, 2, 16)
    assert plan.layers == (3, 5)
    assert messages == pytest.approx(plan.messages, rel=0.01)
    layer = (count_parameters(MODEL) - (2 * 64 * 128 + 128)) / 8
    moved = staged.pop("ppermute") * 4 / 2  # both replicas along `data` move theirs
    assert moved == pytest.approx(2 * 4 * layer, rel=0.02)
    assert moved + 2 * 4 * (2 * 64 * 128 + 128) == pytest.approx(plan.sums, rel=0.02)
    m, b = 16, JOB.batch // 16
    assert messages == pytest.approx(2 * m * b * JOB.length * MODEL.d_model * 2, rel=0.1)
    gradients = 2 * 4 * count_parameters(MODEL)
    assert sum(staged.values()) * 8 < gradients / 10  # embedding, head, counts; no layer's
    replicated = _compiled(mesh__data=2, mesh__fsdp=4)
    assert sum(replicated.values()) * 8 == pytest.approx(gradients, rel=0.1)
    chosen, plans = choose(JOB, sites)
    assert chosen == "stage"
    assert plans["data"].sent == gradients
    assert messages < sum(replicated.values()) * 8
