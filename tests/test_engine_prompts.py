"""What an engine tells of prompts, read in chunks among other requests: scores and vectors."""

import asyncio
import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG, SETTINGS, TOKENIZER, checkpoint, engine_of, params_of

from model import hidden_states, logits
from model.families.importer import POOLING
from serving import Engine, Kind, ParameterError, SamplingParams
from serving.outputs import join

LONG = SamplingParams(temperature=1.0, max_tokens=30, seed=1, ignore_eos=True)
ECHO = SamplingParams(temperature=0.0, max_tokens=3, echo=True, logprobs=2, ignore_eos=True)


@jax.jit
def states_of(tokens):
    hidden, _ = hidden_states(params_of(), tokens[None], CONFIG)
    return hidden[0], logits(params_of(), hidden, CONFIG)[0]


def told(tokens):
    """Log-probabilities of every place's next token, and hidden states, from one forward pass."""
    padded = jnp.asarray([*tokens, *[0] * (48 - len(tokens))])
    hidden, z = (np.asarray(each, np.float64)[: len(tokens)] for each in states_of(padded))
    z -= z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True)), hidden


def texts(count):
    rng = random.Random(3)
    return [[rng.randrange(256) for _ in range(rng.randint(2, 44))] for _ in range(count)]


def check(tokens, scored, top):
    expected, _ = told(tokens)
    assert [each.token for each in scored] == tokens[1:]
    for place, each in enumerate(scored):
        assert each.logprob == pytest.approx(expected[place, each.token], abs=1e-4)
        assert each.rank == 1 + (expected[place] > expected[place, each.token]).sum()
        assert [token for token, _ in each.top] == list(np.argsort(-expected[place])[:top])
        assert (each.logprob == each.top[0][1]) == (each.rank == 1)


@pytest.mark.parametrize("ahead", [True, False])
def test_prompts_read_in_a_crowd_are_told_what_one_forward_pass_says(ahead):
    """Chunks of 16, other requests that decode, and so few pages that some are read twice."""

    async def run(engine):
        answers = []
        for tokens in texts(12):
            answers.append(engine.submit([7, 8, 9], LONG))
            kinds = (SamplingParams(logprobs=2), Kind.SCORE), (LONG, Kind.EMBED)
            answers += [engine.submit(tokens, params, kind=kind) for params, kind in kinds]
            answers.append(engine.submit(tokens, ECHO) if len(tokens) < 45 else answers[-1])
            await asyncio.sleep(0.01)
        return [await answer.all() for answer in answers]

    with engine_of(num_pages=14, async_scheduling=ahead) as engine:
        results = asyncio.run(run(engine))
        stats = engine.stats()
        alone = engine.generate([[7, 8, 9]], LONG)[0]
    assert stats.preemptions
    for tokens, *found in zip(texts(12), *(results[place::4] for place in range(4)), strict=True):
        drawn, score, vector, echo = (result.choices[0] for result in found)
        assert drawn.token_ids == alone.token_ids
        assert (drawn.prompt_logprobs, drawn.vector) == (None, None)
        check(tokens, score.prompt_logprobs, 2)
        assert (score.token_ids, score.finish_reason, score.cached_tokens) == ((), "stop", 0)
        mean = told(tokens)[1].mean(0)
        np.testing.assert_allclose(vector.vector, mean / np.linalg.norm(mean), atol=1e-5)
        check(tokens, echo.prompt_logprobs, 2)
        whole = [*tokens, *echo.token_ids]
        check(whole, (*echo.prompt_logprobs, *echo.logprobs), 2)
    assert stats.pages_free == stats.pages_total


def test_one_text_is_scored_and_made_a_vector_without_an_event_loop():
    tokens = texts(3)[0]
    with engine_of(pooling="last") as engine:
        check(tokens, engine.score(tokens, logprobs=3), 3)
        assert [each.top for each in engine.score(tokens)] == [()] * (len(tokens) - 1)
        last = told(tokens)[1][-1]
        found = engine.embed([tokens, tokens[:5]])
        np.testing.assert_allclose(found[0], last / np.linalg.norm(last), atol=1e-5)
        assert found.shape == (2, CONFIG.d_model)
        full = [1] * 48
        assert len(engine.score(full)) == 47
        with pytest.raises(ParameterError, match="prompt has 49 tokens"):
            engine.embed([[1] * 49])
        with pytest.raises(ParameterError, match="logprobs is 4; it must be at most 3"):
            engine.score(tokens, logprobs=4)
    with pytest.raises(ValueError, match="pooling is 'max'; it must be one of mean, last"):
        engine_of(pooling="max")


def test_vectors_are_made_as_the_checkpoint_says():
    def said(**modes):
        return Engine(
            checkpoint({**TOKENIZER.files(), POOLING: json.dumps(modes).encode()}), SETTINGS
        )

    tokens = texts(3)[0]
    off = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    for modes in ({**off, "pooling_mode_lasttoken": True}, {"pooling_mode": "lasttoken"}):
        assert said(**modes)._pooling == "last"
    with said(**off, pooling_mode_lasttoken=True) as engine:
        last = told(tokens)[1][-1]
        found = engine.embed([tokens])[0]
        np.testing.assert_allclose(found, last / np.linalg.norm(last), atol=1e-5)
    with (
        said(pooling_mode="max") as engine,
        pytest.raises(ParameterError, match="pooled by max; it must be pooled by mean or last"),
    ):
        engine.embed([tokens])


def test_a_prompt_is_told_once_and_first():
    async def run(engine):
        params = dataclasses.replace(ECHO, n=2, temperature=1.0, seed=4)
        return [output async for output in engine.submit([1, 2, 3], params)]

    with engine_of() as engine:
        outputs = asyncio.run(run(engine))
    for choice in (0, 1):
        first, *rest = [each for each in outputs if each.choice == choice]
        assert len(first.prompt_logprobs) == 2
        assert [each.prompt_logprobs for each in rest] == [None, None]
        assert join([first, *rest]).prompt_logprobs == first.prompt_logprobs
