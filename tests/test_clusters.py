"""Placing devices of several clusters: only groups of stages reach over an edge."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding import AXES, Cluster, MeshConfig, cluster_mesh, place
from sharding.clusters import slices, stage_clusters
from training.config import config_dict, default_config, run_config

STAGE = AXES.index("stage")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as `jax.devices()` shows it, as far as placing reads it."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"


def _chips(hosts, each):
    return [Chip(host * each + i, host) for host in range(hosts) for i in range(each)]


@settings(max_examples=80, deadline=None)
@given(
    hosts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    each=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
)
def test_no_group_but_that_of_stages_reaches_over_a_clusters_edge(hosts, each, data):
    chips = _chips(sum(hosts), each)
    shuffled = data.draw(st.permutations(chips))
    order = data.draw(st.permutations(range(sum(hosts))))
    clusters, used = [], 0
    for index, count in enumerate(hosts):
        numbers = tuple(order[used : used + count])
        clusters.append(Cluster(f"c{index}", count, link=1e9, processes=numbers))
        used += count
    sizes = st.sampled_from([1, 2, 3, 4, 8])
    axes = {axis: data.draw(sizes, axis) for axis in ("data", "fsdp", "tensor")}
    in_stage = math.prod(axes.values())
    axes["stage"] = max(len(chips) // in_stage, 1)
    owner = {n: c.name for c in clusters for n in c.processes}
    fits = len(chips) % in_stage == 0 and each % axes["tensor"] == 0
    if not fits or any(count * each % in_stage for count in hosts):
        with pytest.raises(ValueError, match=r"use|devices"):
            place(shuffled, clusters, axes)
        return
    placed = place(shuffled, clusters, axes)
    assert placed.shape == tuple(axes.get(axis, 1) for axis in AXES)
    assert sorted(chip.id for chip in placed.flat) == [chip.id for chip in chips]
    stages = np.moveaxis(placed, STAGE, 0).reshape(axes["stage"], -1)
    found = [{owner[chip.process_index] for chip in stage} for stage in stages]
    assert all(len(names) == 1 for names in found)
    counts = {cluster.name: cluster.hosts * each for cluster in clusters}
    assert tuple(name for names in found for name in names) == stage_clusters(len(stages), counts)
    for group in placed.reshape(-1, axes["tensor"]):
        assert len({chip.process_index for chip in group}) == 1


def _two(*hosts, link=1e9):
    return [Cluster(f"c{index}", count, link) for index, count in enumerate(hosts)]


@pytest.mark.parametrize(
    ("hosts", "axes", "said"),
    [
        ((2, 4), {"data": 8, "stage": 6}, r"stages of 8|is 48 devices"),
        ((2, 4), {"data": 12, "stage": 2}, r"use stage=3, 6, 12, 24 with data"),
        (
            (3, 2),
            {"data": 5, "tensor": 2, "stage": 2},
            r"may have 1, 2, 4 devices.*stage=5, 10, 20",
        ),
        ((2, 2), {"tensor": 8, "stage": 2}, "context x tensor = 8 .* use 1, 2, 4"),
        ((2, 2), {"data": 4, "stage": 2}, "is 8 devices; c0 has 8, c1 has 8, 16 in all"),
        ((2, 2), {"date": 4}, "no mesh axis 'date'"),
        ((2, 3), {"data": 8, "stage": 2}, r"name 5 hosts .*, there are 4"),
    ],
)
def test_sizes_that_cannot_be_laid_are_told_with_those_that_can(hosts, axes, said):
    there = 4 if hosts == (2, 3) else sum(hosts)
    with pytest.raises(ValueError, match=said):
        place(_chips(there, 4), _two(*hosts), axes)


def test_what_the_message_names_does_work():
    for stage in (3, 6, 12, 24):
        place(_chips(6, 4), _two(2, 4), {"data": 24 // stage, "stage": stage})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hosts": 0}, "'a': hosts=0; above 0"),
        ({"hosts": 2, "speed": -1.0}, "speed=-1.0"),
        ({"hosts": 2, "link": -1.0}, "link=-1.0"),
        ({"hosts": 2, "processes": (3,)}, "1 processes"),
    ],
)
def test_clusters_that_cannot_be_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Cluster("a", **fields)


def test_slices_of_a_tpu_pod_are_clusters():
    chips = [Chip(i, process_index=i // 4, slice_index=1 - i // 8) for i in range(16)]
    found = slices(chips)
    assert [cluster.processes for cluster in found] == [(2, 3), (0, 1)]
    placed = place(chips, found, {"stage": 2, "tensor": 8})
    assert {chip.slice_index for chip in placed.take(0, STAGE).flat} == {0}


def test_a_config_may_name_clusters_and_the_mesh_follows_them():
    values = default_config()
    values.clusters = ({"name": "a", "hosts": 1, "processes": (1,)}, {"name": "b", "hosts": 1})
    config = run_config(values)
    assert config.clusters[0] == Cluster("a", 1, processes=(1,))
    assert run_config(config_dict(config)) == config
    with pytest.raises(ValueError, match=r"host 0 is in clusters|name 2 hosts"):
        cluster_mesh(MeshConfig(stage=2), config.clusters, _chips(1, 4))
