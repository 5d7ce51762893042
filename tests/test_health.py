"""Health checks: sound devices pass, a bit that is wrong anywhere is found and named."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from child_flags import cpu_devices
from hypothesis import given, settings
from hypothesis import strategies as st

from training import health
from training.__main__ import main
from training.fleet import linked
from training.health import HealthConfig
from training.health_links import check_ring, neighbours
from training.health_report import ends_of_bad_links, problems, slow_hosts
from training.supervisor_config import SupervisorConfig

SMALL = HealthConfig(64, 2, 2**12, 2**12, 2**12)
FLAGS = [
    f"--{name}={value}"
    for name, value in {
        "matmul-size": 64,
        "matmul-repeats": 2,
        "memory-bytes": 4096,
        "transfer-bytes": 4096,
        "exchange-bytes": 4096,
    }.items()
]


def test_the_command_checks_every_device_and_says_so(tmp_path, capsys):
    path = tmp_path / "health.json"
    assert main(["health", f"--json={path}", *FLAGS]) == 0
    report = json.loads(path.read_text())
    assert len(report["devices"]) == jax.local_device_count() == 8
    assert report["problems"] == []
    for row in report["devices"]:
        assert row["matmul_wrong"] == row["memory_wrong"] == row["transfer_wrong"] == 0
        assert min(row["matmul_tflops"], row["memory_gb_s"], row["to_device_gb_s"]) > 0
    assert report["exchanges"][0]["exchange_wrong"] == 0
    assert report["exchanges"][0]["all_to_all_gb_s"] > 0
    assert "all is well" in capsys.readouterr().out


def test_a_wrong_product_is_seen_in_its_row_and_a_flipped_bit_of_memory_in_its_word():
    size = 64
    a = np.ones((size, size), np.float32)
    expected = np.full(size, size * size, np.int32)
    assert int(health._products(a, a, expected, repeats=3)) == 0
    a[5, 7] = 2.0  # as a faulty multiplier would see it
    assert int(health._products(a, np.ones_like(a), expected, repeats=3)) == 3
    pattern = np.array(health._write(256))
    pattern[17] ^= 1 << 30
    wrong, flipped = health._compare(jnp.asarray(pattern), np.uint32(0))
    assert int(wrong) == 1
    assert int(health._compare(flipped, np.uint32(0xFFFFFFFF))[0]) == 1


def test_exchanges_that_mix_up_devices_are_found(monkeypatch):
    swapped = health._operations(8) | {"all_reduce": lambda x: jax.lax.pmax(x, "device")}
    assert health.check_exchange(SMALL)["exchange_wrong"] == 0
    monkeypatch.setattr(health, "_operations", lambda count: swapped)
    assert health.check_exchange(SMALL)["exchange_wrong"] > 0


def test_the_ring_over_all_devices_hands_on_what_was_sent():
    assert check_ring(4096)["wrong"] == []


def report(**changes) -> dict:
    row = {"matmul_tflops": 100.0, "memory_gb_s": 900.0, "to_device_gb_s": 20.0}
    row |= {"from_device_gb_s": 20.0, "matmul_wrong": 0, "memory_wrong": 0, "transfer_wrong": 0}
    devices = [row | {"device": i, "host": f"node-{i // 4}"} for i in range(8)]
    devices[5] |= changes
    return {"platform": "tpu", "devices": devices, "exchanges": [], "links": [], "rings": []}


def test_what_is_wrong_or_slow_is_named_with_its_host():
    assert problems(report()) == []
    assert problems(report(memory_wrong=3)) == ["device 5 on node-1: 3 wrong of memory"]
    (text,) = problems(report(matmul_tflops=89.0))
    assert text == "device 5 on node-1: matmul_tflops 89, the median is 100"
    assert problems(report(matmul_tflops=91.0)) == []
    assert problems(report(to_device_gb_s=15.0)) == []
    assert problems(report(matmul_tflops=60.0), tolerance=0.5) == []
    assert problems(report(matmul_tflops=60.0) | {"platform": "cpu"}) == []
    link = {"hosts": ["a", "b"], "wrong": 0, "all_reduce_gb_s": 10.0, "permute_gb_s": 10.0}
    links = [link, link, link | {"hosts": ["b", "c"], "permute_gb_s": 2.0}]
    assert problems(report() | {"links": links}) == ["link b - c: permute_gb_s 2, the median is 10"]
    broken = report() | {"links": [link | {"wrong": 9}], "rings": [{"host": "a", "wrong": [3]}]}
    assert problems(broken) == [
        "link a - b: 9 wrong words",
        "device 3 on a: wrong data in the ring",
    ]


def test_a_host_slower_than_the_median_is_left_out_where_three_or_more_tell():
    fast, lame = report(), report(matmul_tflops=85.0)
    assert slow_hosts({"a": fast, "b": lame}) == {}
    assert list(slow_hosts({"a": fast, "b": lame, "c": fast})) == ["b"]


@settings(deadline=None, max_examples=32)
@given(st.integers(2, 33))
def test_every_link_of_the_ring_is_checked_once_and_no_host_twice_at_a_time(count):
    rounds = neighbours(count)
    links = [frozenset(link) for links in rounds for link in links]
    ring = {frozenset((i, (i + 1) % count)) for i in range(count)}
    assert len(links) == len(set(links))
    assert set(links) == ring
    for round_links in rounds:
        ends = [end for link in round_links for end in link]
        assert len(ends) == len(set(ends))
    assert len(rounds) <= 3


@pytest.mark.slow
def test_two_hosts_check_the_link_between_them_and_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", cpu_devices(2))
    config = SupervisorConfig(("node-0", "node-1"), health=tuple(FLAGS), health_seconds=240)
    assert linked(config, config.hosts, tmp_path) == ([], [])
    one, two = (json.loads((tmp_path / f"{host}.json").read_text()) for host in config.hosts)
    assert one["links"] == two["links"]
    (link,) = one["links"]
    assert link["hosts"] == ["node-0", "node-1"]
    assert link["wrong"] == 0
    assert link["all_reduce_gb_s"] > 0
    assert len(one["devices"]) == 4
    assert "link node-0 - node-1" in (tmp_path / "node-0.log").read_text()


def test_the_host_at_which_bad_links_meet_is_the_suspect():
    link = {"wrong": 0, "all_reduce_gb_s": 10.0, "permute_gb_s": 10.0}
    names = "abcdef"
    ring = [link | {"hosts": [a, b]} for a, b in zip(names, names[1:] + "a", strict=True)]
    ring[2] = ring[2] | {"permute_gb_s": 1.0}
    assert ends_of_bad_links(report() | {"links": ring}) == []
    ring[3] = ring[3] | {"wrong": 5}
    assert ends_of_bad_links(report() | {"links": ring}) == ["d"]
