"""A request's fields: the defaults, what each may be, and errors that name the field."""

from __future__ import annotations

import math
import re

import pytest

from serving.checks import ParameterError
from serving.fields import checkpoint_defaults, from_fields
from serving.sampling_params import Limits, SamplingParams, resolve, truncate

LIMITS = Limits(vocab_size=100, max_model_len=50)

REFUSED = [
    ("temperature", [-0.1, 2.1, math.nan, math.inf, "1", True, [1]], r"in \[0, 2\]|finite number"),
    ("top_p", [0, -0.1, 1.01, math.nan], r"in \(0, 1\]|finite number"),
    ("top_k", [-2, 1.5, True, "4"], "an integer of at least -1"),
    ("min_p", [-0.1, 1.1], r"in \[0, 1\]"),
    ("repetition_penalty", [0, -1, math.inf], "more than 0|finite number"),
    ("presence_penalty", [-2.1, 2.1], r"in \[-2, 2\]"),
    ("frequency_penalty", [-2.1, 2.1, None], r"in \[-2, 2\]|finite number"),
    ("logit_bias", [[1], {"x": 1}, {-1: 1}, {"1.0": 1}, {True: 1}, {"²": 1}], "ids"),
    ("logit_bias", [{1: math.nan}, {1: "a"}], "a finite number"),
    ("logit_bias", [dict.fromkeys(range(1025), 1)], "at most 1024"),
    ("allowed_token_ids", [[], [-1], "12", [1.0]], "at least one id|a list of ids|of at least 0"),
    ("bad_words", [[""], [1], 3], "a string or a list strings, none empty|none empty"),
    ("seed", [2**63, -(2**63) - 1, 1.0, True], "an integer -9223372036854775808 to"),
    ("n", [0, 129, 1.0, True], "an integer 1 to 128"),
    ("max_tokens", [-1, 1.5], "an integer of at least 0"),
    ("max_tokens", [0], "at least 1; 0 only with echo"),
    ("min_tokens", [-1], "an integer of at least 0"),
    ("min_tokens", [17], "at most max_tokens, 16"),
    ("stop", ["", ["a", ""], [1], {"a": 1}, [str(i) for i in range(33)]], "at most 32 strings"),
    ("stop_token_ids", [[-1], ["1"], "1", 1], "a list of ids|of at least 0"),
    ("ignore_eos", [1, "true"], "true or false"),
    ("logprobs", [-1, True, 1.0], "an integer of at least 0"),
    ("suffix", [1], "a string or null"),
    ("truncate_prompt_tokens", [-2], "an integer of at least -1"),
    ("truncate_prompt_tokens", [0], "at least 1, or -1 to fit the context"),
    ("truncation_side", ["middle"], '"left" or "right"'),
    ("priority", [1.5, 2**31], "an integer -2147483648 to 2147483647"),
    ("cache_salt", ["", "x" * 1025], "1 to 1024 characters"),
    ("cache_salt", [5], "a string or null"),
    ("skip_special_tokens", [None], "true or false"),
]


@pytest.mark.parametrize(("name", "values", "right"), REFUSED)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(name, values, right):
    for value in values:
        with pytest.raises(ParameterError) as refused:
            SamplingParams(**{name: value})
        error = refused.value
        assert (error.param, error.code) == (name, "invalid_value")
        assert re.search(right, str(error)), str(error)
        assert str(error).startswith(f"{name} ")
        assert len(str(error)) < 250


def test_the_limits_themselves_are_allowed_and_kept_in_one_form():
    kept = SamplingParams(
        temperature=2,
        top_p=1e-9,
        top_k=-1,
        min_p=1,
        presence_penalty=-2,
        seed=-1,
        n=128,
        stop="a",
        stop_token_ids=[3, 3],
        max_tokens=0,
        echo=True,
        cache_salt="x" * 1024,
    )
    assert (kept.temperature, kept.top_k, kept.seed) == (2.0, 0, None)
    biased, _ = from_fields({"logit_bias": {"7": -1000, "8": 3}})
    assert biased.logit_bias == {7: -100.0, 8: 3.0}
    assert (kept.stop, kept.stop_token_ids) == (("a",), (3,))
    assert SamplingParams(stop=[]).stop == ()
    assert SamplingParams(seed=-(2**63)).seed == -(2**63)


def test_the_defaults_are_those_of_the_api():
    plain = SamplingParams()
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (1.0, 1.0, 0, 0.0)
    assert (plain.max_tokens, plain.n, plain.logprobs, plain.skip_special_tokens) == (
        16,
        1,
        None,
        True,
    )
    assert from_fields({}) == (plain, ())
    assert from_fields({}, chat=True)[0].max_tokens is None


def test_a_tiny_temperature_is_raised_and_says_so():
    with pytest.warns(UserWarning, match=r"temperature 0.001 is raised to 0.01"):
        assert SamplingParams(temperature=0.001).temperature == 0.01
    assert SamplingParams(temperature=0.01).temperature == 0.01
    assert SamplingParams(temperature=0).temperature == 0.0


def test_equal_answers_are_computed_once():
    assert SamplingParams(n=4, temperature=0).candidates == 1
    assert SamplingParams(n=4).candidates == 4
    assert SamplingParams(n=2, best_of=5).candidates == 5
    with pytest.raises(ParameterError, match="best_of is 1; it must be an integer 2 to 128"):
        SamplingParams(n=2, best_of=1)


def test_what_the_request_says_goes_before_the_checkpoint_and_that_before_the_api():
    file = {"temperature": 0.6, "top_k": 20, "top_p": None, "max_new_tokens": 9, "eos_token_id": 2}
    defaults = checkpoint_defaults(file)
    params, _ = from_fields({"temperature": 0.9, "top_k": None}, defaults=defaults)
    assert (params.temperature, params.top_k, params.top_p) == (0.9, 20, 1.0)
    assert params.max_tokens == 9
    assert (
        from_fields({"max_completion_tokens": 3}, chat=True, defaults=defaults)[0].max_tokens == 3
    )
    greedy = checkpoint_defaults({"do_sample": False, "temperature": 0.6})
    assert from_fields({}, defaults=greedy)[0].temperature == 0.0
    assert checkpoint_defaults({"eos_token_id": 2}) == {}
    longer = checkpoint_defaults({"min_new_tokens": 10})
    assert from_fields({"max_tokens": 4}, defaults=longer)[0].min_tokens == 4


def test_fields_that_nobody_knows_are_named():
    fields = {"model": "m", "prompt": "p", "top_q": 1, "stream": True, "typo": None, "top_p": 0.5}
    params, unknown = from_fields(fields, other_fields=("model", "prompt"))
    assert (params.top_p, unknown) == (0.5, ("top_q", "typo"))
    assert from_fields({"top_logprobs": 3})[1] == ("top_logprobs",)


def test_chat_has_its_own_names_for_lengths_and_log_probabilities():
    params, unknown = from_fields({"max_tokens": 5, "max_completion_tokens": 7}, chat=True)
    assert (params.max_tokens, unknown) == (7, ())
    assert from_fields({"logprobs": True}, chat=True)[0].logprobs == 0
    assert from_fields({"logprobs": True, "top_logprobs": 4}, chat=True)[0].logprobs == 4
    assert from_fields({"logprobs": False, "echo": False}, chat=True)[0].logprobs is None
    for fields, param in [
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
    ]:
        with pytest.raises(ParameterError) as refused:
            from_fields(fields, chat=True)
        assert refused.value.param == param


def test_the_best_of_several_cannot_be_streamed():
    assert from_fields({"best_of": 2, "n": 2, "stream": True})[0].candidates == 2
    for fields in ({"best_of": 2}, {"best_of": 3, "n": 2}):
        assert from_fields(fields)[0].best_of == fields["best_of"]
        with pytest.raises(
            ParameterError, match=r"best_of is \d; it must be n, or null, with stream"
        ):
            from_fields(fields | {"stream": True})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"100": 1}}, "logit_bias"),
        ({"allowed_token_ids": [100]}, "allowed_token_ids"),
        ({"stop_token_ids": [5, 100]}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"priority": 1}, "priority"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_what_this_model_cannot_do_is_refused(fields, param):
    with pytest.raises(ParameterError) as refused:
        resolve(SamplingParams(**fields), 10, LIMITS)
    assert refused.value.param == param
    able = Limits(101, 50, max_logprobs=21, prioritises=True, fills_in_middle=True)
    assert resolve(SamplingParams(**fields), 10, able)


def test_what_is_longer_than_the_context_says_by_how_much():
    assert resolve(SamplingParams(max_tokens=40), 10, LIMITS).max_tokens == 40
    assert resolve(SamplingParams(max_tokens=None), 10, LIMITS).max_tokens == 40
    assert resolve(SamplingParams(max_tokens=0, echo=True), 50, LIMITS).max_tokens == 0
    for params, length in [
        (SamplingParams(max_tokens=41), 10),
        (SamplingParams(max_tokens=None), 50),
        (SamplingParams(max_tokens=0, echo=True), 51),
    ]:
        with pytest.raises(ParameterError, match="maximum context of 50 tokens") as refused:
            resolve(params, length, LIMITS)
        assert refused.value.code == "context_length_exceeded"
        assert f"({length} in the prompt and " in str(refused.value)
    with pytest.raises(ParameterError, match="min_tokens is 9; it must be at most 5"):
        resolve(SamplingParams(max_tokens=None, min_tokens=9), 45, LIMITS)


def test_a_seed_is_drawn_once_and_kept():
    drawn = [resolve(SamplingParams(), 1, LIMITS).seed for _ in range(20)]
    assert len(set(drawn)) == 20
    assert all(seed is not None and 0 <= seed < 2**63 for seed in drawn)
    assert resolve(SamplingParams(seed=-1), 1, LIMITS, lambda: 5).seed == 5
    assert resolve(SamplingParams(seed=0), 1, LIMITS, lambda: 5).seed == 0


def test_a_prompt_is_cut_at_the_side_that_was_asked_for():
    prompt = list(range(60))
    for fields, kept in [
        ({}, prompt),
        ({"truncate_prompt_tokens": 3}, [57, 58, 59]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [0, 1, 2]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 8}, prompt[-42:]),
        ({"truncate_prompt_tokens": -1, "max_tokens": None}, prompt[-49:]),
        ({"truncate_prompt_tokens": 99}, prompt),
    ]:
        assert list(truncate(prompt, SamplingParams(**fields), LIMITS)) == kept
