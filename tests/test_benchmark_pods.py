"""The table of large models: its rows can be compiled, and a run that was stopped goes on."""

import collections
import json

import pytest

from benchmarks import pods
from planning.compile_ahead import parse_topology
from training.command_line import parse

SIX = {"k2_65b", "llama2_70b", "gpt3_175b", "gpt_1t", "jetmoe_8b", "minicpm_2b"}


@pytest.mark.parametrize("pod", pods.PODS, ids=lambda pod: f"{pod.config}-{pod.topology}")
def test_meshes_divide_devices_batch_heads_and_width(pod):
    flags = [flag for flag in pod.command("figures")[4:] if flag.startswith("--config")]
    config = parse(flags).config
    sizes = config.mesh.sizes(parse_topology(pod.topology).chips)
    model = config.model.resolve()
    rows = sizes["data"] * sizes["fsdp"] * sizes["expert"] * config.train.accumulation
    assert config.data.batch_size % rows == 0
    assert model.num_heads % sizes["tensor"] == model.d_model % sizes["fsdp"] == 0


def test_every_model_stands_on_two_topologies():
    places = collections.defaultdict(set)
    for pod in pods.PODS:
        places[pod.config].add(pod.topology)
    assert {config for config, topologies in places.items() if len(topologies) > 1} >= SIX


def test_rows_are_kept_and_a_line_cut_short_is_compiled_again(tmp_path, capsys, monkeypatch):
    file, figures = tmp_path / "rows.jsonl", {"memory": 2**30, "limit": 2**31, "limited_by": "x"}
    figures |= {"mfu_serial": 0.5, "mfu_overlapped": 0.75, "compile_seconds": 60.0}
    first, second = pods.PODS[:2]
    kept = json.dumps({"key": first.key, **figures})
    file.write_text(f'{kept}\n{{"key": "{second.key}", "mem')
    monkeypatch.setattr(pods, "compiled", lambda pod: {"error": f"{pod.config} told why"})
    assert pods.main([f"--rows={file}", "--limit=1"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "| 1.0 (2.0) | 50.0% to 75.0% | x |" in shown[2]
    assert f"| {second.config} told why |" in shown[3]
    assert len(shown) == 4
