"""The operator table and the roofline against published figures and the model's own counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ModelConfig
from planning.hardware import HARDWARE
from planning.operators import (
    Bits,
    Work,
    cache_bytes_per_token,
    decode,
    model_flops_utilization,
    operators,
    prefill,
    total_flops,
    training_flops_per_token,
)
from planning.roofline import compute_bound_batch, seconds, timed
from training.throughput import flops_per_token

LLAMA2_7B = ModelConfig(vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, d_ff=11008)


def milliseconds(name, work, bits=None):
    return 1e3 * seconds(timed(operators(LLAMA2_7B, work, bits), HARDWARE[name], bits))


def of_name(ops, name):
    return next(op for op in ops if op.name == name)


def test_the_query_projection_of_llama2_7b_is_that_of_llm_viewer():
    op = of_name(operators(LLAMA2_7B, prefill(1, 2048)), "attention/query")
    assert (op.flops, op.bytes) == (pytest.approx(68.72e9, rel=1e-4), pytest.approx(67.11e6, 1e-4))
    assert op.intensity == pytest.approx(1024)
    assert HARDWARE["a6000"].turning_point == pytest.approx(201.6, abs=0.05)
    op = of_name(operators(LLAMA2_7B, decode(1, 2048)), "attention/query")
    assert (op.flops, op.bytes) == (pytest.approx(33.55e6, rel=1e-3), pytest.approx(33.57e6, 1e-3))
    assert op.intensity == pytest.approx(0.9995, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "one", "prompt", "many"),
    [
        ("a6000", 18.61, 185.9, 107.2),
        ("a100-80g", 7.01, 92.2, 40.4),
        ("tpu-v5e", 17.45, 146.1, 100.5),
        ("h200", 2.98, 29.1, 17.1),
    ],
)
def test_whole_passes_take_the_times_recomputed_from_llm_viewer(name, one, prompt, many):
    assert milliseconds(name, decode(1, 2048)) == pytest.approx(one, abs=0.006)
    assert milliseconds(name, prefill(1, 2048, causal=False)) == pytest.approx(prompt, abs=0.06)
    assert milliseconds(name, decode(64, 2048)) == pytest.approx(many, abs=0.06)


def test_four_bits_speed_up_decoding_and_leave_prefill():
    assert milliseconds("a100-80g", decode(1, 2048), Bits(weights=4.25)) == pytest.approx(
        2.34, 0.01
    )
    before = milliseconds("a100-80g", prefill(1, 2048))
    assert milliseconds("a100-80g", prefill(1, 2048), Bits(weights=4.25)) == pytest.approx(
        before, 0.01
    )
    assert compute_bound_batch(HARDWARE["a100-80g"]) == pytest.approx(153, abs=0.5)


@pytest.mark.parametrize(
    ("speed", "devices", "mfu"),
    [(1466.8e3, 12288, 0.412), (433.6e3, 3072, 0.487), (39.3e3, 256, 0.53)],
)
def test_megascale_reports_the_mfu_that_the_count_gives(speed, devices, mfu):
    gpt = ModelConfig(
        vocab_size=64000,
        d_model=12288,
        num_layers=96,
        num_heads=96,
        feed_forward="plain",
        norm="layernorm",
        tied_embeddings=True,
    )
    flops = training_flops_per_token(gpt, 2048, causal=False)
    assert model_flops_utilization(speed, devices, 312e12, flops) == pytest.approx(mfu, abs=0.002)


models = st.builds(
    ModelConfig,
    vocab_size=st.integers(50, 300),
    d_model=st.just(64),
    num_layers=st.integers(1, 3),
    num_heads=st.just(8),
    kv_heads=st.sampled_from([1, 2, 8]),
    d_ff=st.integers(8, 200),
    feed_forward=st.sampled_from(["gated", "plain", "experts"]),
    sliding_window=st.sampled_from([None, 1, 5, 64]),
    tied_embeddings=st.booleans(),
)


@settings(deadline=None, max_examples=30)
@given(models, st.integers(1, 40))
def test_training_flops_are_those_that_a_run_reports(config, length):
    ours, theirs = training_flops_per_token(config, length), flops_per_token(config, length)
    vectors = (
        6 * 20 * config.d_model * config.num_layers
    )  # a run counts norms as if they multiplied
    if config.sliding_window is None:
        assert ours == pytest.approx(theirs, abs=vectors)


@settings(deadline=None, max_examples=50)
@given(models, st.integers(1, 12), st.integers(0, 30))
def test_attention_counts_the_scores_that_the_mask_leaves(config, query, cached):
    work = Work(2, query, cached + query)
    layer = config.layer(0)
    seen = 0
    for place in range(cached, cached + query):
        seen += min(place + 1, layer.sliding_window or place + 1)
    op = of_name(operators(config, work), "attention")
    assert op.flops == pytest.approx(4 * 2 * layer.num_heads * layer.head_dim * seen)


def test_devices_share_heads_and_widths_and_sum_two_results_a_layer():
    whole, part = (operators(LLAMA2_7B, decode(8, 512), tensor=n) for n in (1, 4))
    assert total_flops(part) == pytest.approx(total_flops(whole) / 4)
    assert {op.name for op in part if op.reduced} == {"attention/output", "feed_forward/down"}
    assert cache_bytes_per_token(LLAMA2_7B) == 2 * 32 * 4096 * 2


def test_wrong_work_is_named():
    with pytest.raises(ValueError, match="context=3 holds fewer tokens than query=4"):
        Work(1, 4, 3)
