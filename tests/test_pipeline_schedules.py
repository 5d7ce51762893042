"""Pipeline schedules are tables: that each pass happens once, in order and in time, and that idle
ticks and kept inputs are as many as the formulas say, is counted from them, without JAX.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding import PipelineConfig, bubble_formula, check_layers, pipeline_schedule
from sharding.pipeline_schedules import chunk_routes


@st.composite
def _schedules(draw):
    name = draw(st.sampled_from(["gpipe", "interleaved", "1f1b"]))
    stages = draw(st.integers(1, 6))
    many = draw(st.integers(1, 10))
    if name != "interleaved":
        return name, pipeline_schedule(PipelineConfig(name), stages, many)
    config = PipelineConfig(name, draw(st.integers(1, 4)))
    return name, pipeline_schedule(config, stages, stages * (1 + many // 3))


@given(_schedules())
def test_every_micro_batch_passes_every_chunk_in_order_and_back(named):
    _, schedule = named
    p, v = schedule.stages, schedule.repeats
    works = list(schedule.work())
    assert len(works) == 2 * p * v * schedule.micro_batches
    assert len({(work.tick, work.stage) for work in works}) == len(works)
    assert all(work.chunk % p == work.stage for work in works)
    # Ticks of one direction: what is sent in one is read in the next.
    count = {"F": 0, "B": 0}
    numbers = []
    for direction in schedule.passes:
        numbers.append(count[direction])
        count[direction] += 1
    assert all(schedule.passes[work.tick] == "FB"[work.backward] for work in works)
    for micro_batch in range(schedule.micro_batches):
        mine = [work for work in works if work.micro_batch == micro_batch]
        forward = [work for work in mine if not work.backward]
        backward = [work for work in mine if work.backward]
        assert [work.chunk for work in forward] == list(range(p * v))
        assert [work.chunk for work in backward] == list(range(p * v))[::-1]
        assert forward[-1].tick < backward[0].tick
        for passes in (forward, backward):
            reached = [numbers[work.tick] for work in passes]
            assert reached == list(range(reached[0], reached[0] + p * v))


@given(_schedules())
def test_idle_ticks_and_kept_inputs_are_those_of_the_formulas(named):
    name, schedule = named
    p, m, v = schedule.stages, schedule.micro_batches, schedule.repeats
    assert len(schedule.passes) == 2 * (m * v + p - 1)
    assert schedule.bubble == pytest.approx(bubble_formula(p, m, v), abs=1e-12)
    if name == "1f1b":
        assert schedule.kept() == [min(m, 2 * (p - 1 - stage) + 1) for stage in range(p)]
    else:
        assert schedule.kept() == [m * v] * p


def test_four_stages_and_eight_micro_batches_by_hand():
    # Narayanan et al. 2021, figures 3 and 4: three of eleven time slots, and half of that.
    assert pipeline_schedule(PipelineConfig("gpipe"), 4, 8).bubble == pytest.approx(3 / 11)
    halved = pipeline_schedule(PipelineConfig("interleaved", 2), 4, 8)
    assert halved.bubble == pytest.approx(3 / 19)
    first = [(w.tick, w.micro_batch, w.chunk) for w in halved.work() if w.stage == 0][:9]
    assert first[3:5] == [(3, 3, 0), (4, 0, 4)]
    assert first[8] == (8, 4, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PipelineConfig("1f1"), r"pipeline.schedule='1f1': .* nearest: 1f1b"),
        (lambda: PipelineConfig("gpipe", 2), r"repeats=2 needs pipeline.schedule='interleaved'"),
        (lambda: PipelineConfig("interleaved", 0), r"pipeline.repeats=0 must be at least 1"),
        (
            lambda: pipeline_schedule(PipelineConfig("interleaved", 2), 4, 6),
            r"6 micro-batches \(train.accumulation\) .* mesh.stage=4.*; use 4 or 8",
        ),
        (lambda: check_layers(10, 4), r"10 layers do not divide over mesh.stage=4; use .*2 or 5"),
        (lambda: check_layers(8, 4, 3), r"over mesh.stage=4 x 3 repeats; use fewer"),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_what_would(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(st.integers(1, 12), st.integers(1, 9))
def test_chunks_reach_their_stages_with_one_sent_and_one_received_a_round(stages, repeats):
    rounds = chunk_routes(stages, repeats)
    assert len(rounds) == repeats
    for routes in rounds:
        assert [route.stage for route in routes] == list(range(stages))
        assert sorted(route.to_stage for route in routes) == list(range(stages))
    routes = [route for one in rounds for route in one]
    chunks = {route.stage * repeats + route.slot: route for route in routes}
    assert len(chunks) == stages * repeats
    for chunk, route in chunks.items():
        assert (route.to_slot, route.to_stage) == divmod(chunk, stages)
