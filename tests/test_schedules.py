"""The learning rate at every boundary of every schedule, against its formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.schedules import SCHEDULES, SHAPES, ScheduleConfig, make_schedule

PEAK, STEPS = 3e-3, 1000


def rate(config: ScheduleConfig, step: int, steps: int = STEPS) -> float:
    return float(make_schedule(config, PEAK, steps)(step)) / PEAK


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear_from_zero_and_meets_the_peak(name):
    config = ScheduleConfig(name=name, warmup=100)
    for step in (0, 1, 50, 99, 100):
        assert rate(config, step) == pytest.approx(step / 100, rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_ends_at_the_floor_and_stays_there(name):
    config = ScheduleConfig(name=name, floor=0.1, warmup=0)
    for step in (STEPS, STEPS + 1, 10 * STEPS):
        assert rate(config, step) == pytest.approx(0.1, rel=1e-5)
    assert rate(config, STEPS - 1) > 0.1


def test_cosine_and_linear_follow_their_formulas():
    for step in (200, 201, 400, 600, 999):
        share = (step - 200) / 800
        half_cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share))
        straight = 0.05 + 0.95 * (1 - share)
        config = ScheduleConfig(name="cosine", warmup=0.2, floor=0.05)
        assert rate(config, step) == pytest.approx(half_cosine, rel=1e-5)
        config = ScheduleConfig(name="linear", warmup=0.2, floor=0.05)
        assert rate(config, step) == pytest.approx(straight, rel=1e-5)


def test_minicpm_decay_halves_every_half_life():
    config = ScheduleConfig(name="wsd", warmup=10, decay=100, half_life=25, floor=0.0)
    assert [rate(config, step) for step in (10, 500, 900)] == pytest.approx([1, 1, 1])
    expected = {901: 0.5 ** (1 / 25), 925: 0.5, 950: 0.25, 975: 0.125, 1000: 0.0625}
    for step, value in expected.items():
        assert rate(config, step) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "middle"),
    [
        ("linear", 0.5),
        ("one_minus_sqrt", 1 - math.sqrt(0.5)),
        ("cosine", 0.5),
        ("exponential", 0.1),
    ],
)
def test_decay_shapes_at_half_of_the_decay(shape, middle):
    config = ScheduleConfig(name="wsd", warmup=0, decay=0.2, shape=shape, floor=0.0)
    assert rate(config, 800) == pytest.approx(1)
    assert rate(config, 900) == pytest.approx(middle, rel=1e-5)


def test_multi_step_changes_at_its_milestones():
    config = ScheduleConfig(name="multi_step", warmup=20, milestones=(0.8, 900), factors=(0.3, 0.1))
    expected = {19: 0.95, 20: 1, 799: 1, 800: 0.3, 899: 0.3, 900: 0.1, 2000: 0.1}
    for step, value in expected.items():
        assert rate(config, step) == pytest.approx(value, rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    shape=st.sampled_from(sorted(SHAPES)),
    steps=st.integers(1, 5000),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.45),
    floor=st.floats(0, 1),
)
def test_stays_between_zero_and_the_peak_and_only_falls_after_warmup(
    name, shape, steps, warmup, decay, floor
):
    config = ScheduleConfig(name=name, shape=shape, warmup=warmup, decay=decay, floor=floor)
    try:
        schedule = make_schedule(config, 1.0, steps)
    except ValueError:
        return
    at = np.sort(np.linspace(0, steps + 2, 64, dtype=np.int32))
    rates = np.asarray(schedule(at))
    assert np.all((rates >= 0) & (rates <= 1 + 1e-6))
    assert np.all(np.diff(rates[at >= round(warmup * steps)]) <= 1e-6)


def test_compiled_and_called_with_an_int_agree():
    schedule = make_schedule(ScheduleConfig(name="wsd"), PEAK, STEPS)
    for step in (0, 7, 20, 950):
        assert float(jax.jit(schedule)(jnp.int32(step))) == pytest.approx(
            float(schedule(step)), rel=1e-6
        )


@pytest.mark.parametrize(
    ("fields", "steps", "words"),
    [
        ({"name": "wsd", "warmup": 60, "decay": 60}, 100, "warm-up of 60 and decay of 60"),
        ({"name": "cosine", "warmup": 200}, 100, "longer than the run of 100"),
        ({"name": "multi_step", "milestones": (900.0, 950.0)}, 100, "within the run"),
        ({"name": "multi_step", "milestones": (0.9, 0.5)}, 100, "must increase"),
        ({"name": "wsd", "warmup": 1.5}, 100, "whole steps"),
    ],
)
def test_phases_that_do_not_fit_are_refused(fields, steps, words):
    with pytest.raises(ValueError, match=words):
        make_schedule(ScheduleConfig(**fields), PEAK, steps)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "cosin"}, "nearest: cosine"),
        ({"shape": "sqrt"}, "nearest: one_minus_sqrt"),
        ({"floor": 2.0}, "schedule.floor is 2.0"),
        ({"milestones": (0.5,)}, "each milestone needs one factor"),
        ({"warmup": -1.0}, "schedule.warmup is -1.0"),
    ],
)
def test_wrong_settings_name_the_field(fields, words):
    with pytest.raises(ValueError, match=words):
        ScheduleConfig(**fields)
