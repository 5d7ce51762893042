"""Every request gets what it would get alone, whatever else an engine does; and nothing is left."""

import asyncio
import dataclasses
import functools
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_engine import CONFIG, SETTINGS, TOKENIZER, checkpoint, engine_of, params_of

from model import forward, generate, rules
from model.checkpoint import save
from serving import Engine, EngineStoppedError, ParameterError, QueueFullError, SamplingParams
from serving.device import prepared
from serving.outputs import join, mean_logprob
from serving.step import _admit, run_step
from sharding import MeshConfig, make_layout, make_mesh, partition
from weights import LowRank, grouped, map_with_path, stack

NEW = 14
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW)
HOT = SamplingParams(temperature=1.2, top_p=0.95, max_tokens=NEW, seed=7)
SHARED = list(b"a prefix that many share")


@pytest.fixture(scope="module")
def engine():
    with engine_of() as running:
        yield running


def prompts(count, seed=0):
    rng = random.Random(seed)
    drawn = []
    for _ in range(count):
        tail = [rng.randrange(256) for _ in range(rng.randint(1, 9))]
        drawn.append(tail if rng.random() < 0.3 else SHARED[: rng.randint(4, 24)] + tail)
    return drawn


@functools.cache
def alone(count):
    """What each of `prompts(count)` gets from the model by itself."""
    made = generate(
        params_of(), prompts(count), CONFIG, max_new_tokens=NEW, stop_tokens=(TOKENIZER.eos,)
    )
    return [tuple(row) for row in made.lists()]


def idle(engine):
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.pages_free == stats.pages_total
    return stats


@pytest.mark.parametrize("ahead", [True, False])
def test_greedy_requests_get_what_they_get_alone(ahead):
    """Prompts in chunks beside decoding ones, shared prefixes, too few pages, others that leave."""

    async def run(engine):
        rng = random.Random(2)
        long = dataclasses.replace(HOT, max_tokens=46, ignore_eos=True)
        kept, others = [], []
        for index, prompt in enumerate(prompts(24)):
            kept.append(engine.submit(prompt, GREEDY))
            if index % 4 == 0:
                others.append(engine.submit([1], long))
            if index % 3 == 0:
                await asyncio.sleep(rng.random() * 0.02)
                others.pop(0).abort() if others else None
        return await asyncio.gather(*(answer.all() for answer in kept))

    with engine_of(async_scheduling=ahead) as engine:
        results = asyncio.run(run(engine))
        assert [result.token_ids for result in results] == alone(24)
        engine.generate([[1]], GREEDY)
        stats = idle(engine)
        assert stats.preemptions
        assert stats.prefix_hits
        assert stats.finished["abort"]


def test_seeds_decide_what_is_drawn_and_nothing_else(engine):
    """The same in a crowd as alone; three choices differ, and each is what it was."""
    asked = [(prompt, dataclasses.replace(HOT, n=3, seed=i)) for i, prompt in enumerate(prompts(5))]
    together = engine.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    for (prompt, params), result in zip(asked, together, strict=True):
        again = engine.generate([prompt], params)[0]
        tokens = [choice.token_ids for choice in result.choices]
        assert tokens == [choice.token_ids for choice in again.choices]
        assert len(set(tokens)) == 3
    unseeded = dataclasses.replace(HOT, seed=None)
    assert len({result.token_ids for result in engine.generate([[5, 6]] * 4, unseeded)}) == 4
    greedy = engine.generate([[5, 6]], dataclasses.replace(GREEDY, n=2))[0]
    assert [choice.choice for choice in greedy.choices] == [0, 1]
    assert greedy.choices[0].token_ids == greedy.choices[1].token_ids
    assert greedy.completion_tokens == 2 * len(greedy.token_ids)


def test_nothing_is_left_after_requests_that_come_and_go(engine):
    before = engine.stats()
    rng = random.Random(3)

    async def one(prompt, index):
        await asyncio.sleep(rng.random() * 0.5)
        params = rng.choice([GREEDY, HOT, dataclasses.replace(HOT, n=2, logprobs=1)])
        read, most = [], rng.choice([0, 1, 5, 100])
        async with engine.submit(prompt, params, cache_key=str(index % 2)) as answer:
            async for output in answer:
                read.append(output)
                if len(read) >= most:
                    return params, None
        return params, read

    async def run():
        drawn = prompts(200, seed=4)
        return await asyncio.gather(*map(one, drawn, range(len(drawn))))

    outcomes = asyncio.run(run())
    engine.generate([[1]], GREEDY)
    after = idle(engine)
    asked = sum(params.candidates for params, _ in outcomes) + 1
    assert sum(after.finished.values()) - sum(before.finished.values()) == asked
    assert after.finished["abort"] > before.finished["abort"]
    whole = [read for _, read in outcomes if read is not None]
    assert len(whole) > 50
    assert all(read[-1].finish_reason in ("length", "stop") for read in whole)


def test_deltas_join_to_the_text_of_the_tokens(engine):
    """Bytes at random: characters lie across tokens, and some are broken."""

    async def stream(prompt, params):
        return [output async for output in engine.submit(prompt, params)]

    prompt, params = (
        list("Zürich".encode()),
        dataclasses.replace(
            HOT, max_tokens=30, ignore_eos=True, logit_bias={256: -100.0, 257: -100.0}
        ),
    )
    outputs = asyncio.run(stream(prompt, params))
    whole = join(outputs)
    at_once = engine.generate([prompt], params)[0]
    assert (whole.text, whole.token_ids) == (at_once.text, at_once.token_ids)
    assert whole.text == TOKENIZER.decode(whole.token_ids)
    assert [output.completion_tokens for output in outputs] == list(range(1, 31))
    assert [output.finish_reason for output in outputs] == [None] * 29 + ["length"]
    stop = whole.text[10:13]
    stopped = asyncio.run(stream(prompt, dataclasses.replace(params, stop=(stop, "never"))))
    cut = join(stopped)
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in TOKENIZER.decode(cut.token_ids)
    end = dataclasses.replace(params, stop_token_ids=(whole.token_ids[4],))
    by_token = engine.generate([prompt], end)[0].choices[0]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", whole.token_ids[4])
    assert by_token.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[4]) + 1]


def test_logprobs_are_those_of_a_whole_forward_pass(engine):
    prompt = SHARED[:9]
    result = engine.generate([prompt], dataclasses.replace(GREEDY, logprobs=2))[0]
    answer = result.choices[0]
    tokens = [*prompt, *answer.token_ids]
    logits = np.asarray(
        jax.jit(forward, static_argnames="config")(params_of(), jnp.asarray([tokens]), CONFIG)[0][
            0
        ],
        np.float64,
    )
    expected = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    expected -= logits.max(1, keepdims=True)
    scored = engine.score(tokens, logprobs=2)
    assert len(scored) == len(tokens) - 1
    for place, found in enumerate(scored):
        assert found.token == tokens[place + 1]
        assert found.logprob == pytest.approx(expected[place, found.token], abs=1e-4)
        assert found.rank == 1 + (expected[place] > expected[place, found.token]).sum()
        assert [token for token, _ in found.top] == list(np.argsort(-expected[place])[:2])
    assert answer.logprobs is not None
    for found, again in zip(answer.logprobs, scored[len(prompt) - 1 :], strict=True):
        assert found.logprob == pytest.approx(again.logprob, abs=1e-4)
        assert found.rank == 1
        assert found.top[0] == (found.token, found.logprob)
        assert [token for token, _ in found.top] == [token for token, _ in again.top]
    assert engine.generate([prompt], GREEDY)[0].choices[0].logprobs is None


def test_the_best_of_several_are_the_likeliest(engine):
    params = dataclasses.replace(HOT, n=4, logprobs=0)
    drawn = engine.generate([[1, 2]], params)[0].choices
    ranked = sorted(drawn, key=mean_logprob, reverse=True)
    best = engine.generate([[1, 2]], dataclasses.replace(params, n=2, best_of=4, logprobs=None))[0]
    assert [one.token_ids for one in best.choices] == [one.token_ids for one in ranked[:2]]
    assert [one.choice for one in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.completion_tokens == sum(len(one.token_ids) for one in drawn)


def test_prefixes_are_shared_only_under_one_key(engine):
    engine.reset_prefix_cache()

    def cached(key):
        async def run():
            return await engine.submit(SHARED, GREEDY, cache_key=key).all()

        return asyncio.run(run()).choices[0].cached_tokens

    # The last token is computed in any case, and with it its page.
    assert [cached(key) for key in ("a", "a", "b", "a")] == [0, 20, 0, 20]
    engine.reset_prefix_cache()
    assert cached("a") == 0


def test_once_ready_nothing_is_compiled_and_the_next_start_compiles_nothing(tmp_path, caplog):
    biased = dataclasses.replace(HOT, logit_bias={5: 3.0}, bad_words=("ab",), min_tokens=3)
    params = [GREEDY, HOT, dataclasses.replace(HOT, logprobs=2), biased]

    def started(count):
        with engine_of(warm_up=True) as engine:
            assert engine.wait_ready(60)
            traced = run_step._cache_size(), _admit._cache_size()
            results = engine.generate([*prompts(12)], params * 3)
            assert (run_step._cache_size(), _admit._cache_size()) == traced
            assert engine.stats().compilations == {"warmup": count, "serving": 0}
            assert engine.ready
        return [result.token_ids for result in results]

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.clear_caches()  # A program that another test has read from disk cannot be written again.
    try:
        first = started(2)
        assert started(0) == first
        kept = sorted((tmp_path / "programs").iterdir())
        assert len(kept) == 2
        kept[0].write_bytes(kept[0].read_bytes()[:99])
        assert started(1) == first
        assert "cannot be read" in caplog.text
        kept[0].write_bytes(kept[1].read_bytes())
        assert started(1) == first
        assert "does not run" in caplog.text
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_what_waits_or_runs_too_long_ends():
    async def run():
        engine = engine_of(queue_timeout_s=0.05, request_timeout_s=0.4, warm_up=True)
        waited = engine.submit([1], GREEDY)
        await asyncio.sleep(0.1)
        engine.start()
        late = (await waited.all()).choices[0]
        running = engine.submit(SHARED, dataclasses.replace(GREEDY, max_tokens=24, ignore_eos=True))

        def hold():
            """Once there is a token, keep the thread for longer than a request may take."""
            if engine.stats().generation_tokens:
                time.sleep(0.5)
            else:
                engine._loop.post(hold)

        hold()
        outputs = [output async for output in running]
        await engine.stop()
        return late, outputs

    late, outputs = asyncio.run(run())
    assert (late.finish_reason, late.stop_reason, late.token_ids) == ("error", "queue_timeout", ())
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("length", "timeout")
    assert 0 < outputs[-1].completion_tokens < 24


def test_requests_that_cannot_be_are_refused_by_name(engine):
    async def refused(tokens, params=GREEDY, to=engine, **options):
        to.submit(tokens, params, **options)

    cases = [
        ("prompt is empty", [], GREEDY),
        ("prompt has id 258; it must be ids 0..257", [258], GREEDY),
        ("prompt has 49 tokens; it must be at most", [1] * 49, GREEDY),
        ("max_tokens asks for 54 tokens", [1] * 40, GREEDY),
        ("logprobs is 4; it must be at most 3", [1], dataclasses.replace(GREEDY, logprobs=4)),
        ("bad_words has 8 entries", [1], dataclasses.replace(GREEDY, bad_words=tuple("abcd"))),
    ]
    for message, tokens, params in cases:
        with pytest.raises(ParameterError, match=message):
            asyncio.run(refused(tokens, params))
    silent = Engine(checkpoint(files={}), dataclasses.replace(SETTINGS, max_waiting=2))
    with pytest.raises(ParameterError, match="stop is given; it must be empty: the checkpoint has"):
        asyncio.run(refused([1], dataclasses.replace(GREEDY, stop=("a",)), silent))

    async def fill():
        for name in ("a", "b", "a"):
            silent.submit([1], GREEDY, request_id=name)

    with pytest.raises(QueueFullError, match="2 requests wait"):
        asyncio.run(fill())
    silent.close()
    with pytest.raises(EngineStoppedError, match="takes no more requests"):
        asyncio.run(refused([1], to=silent))


def test_an_id_is_used_once_and_a_stop_ends_what_is_left():
    async def run():
        engine = engine_of()
        engine.start()
        answer = engine.submit([1], dataclasses.replace(HOT, max_tokens=40, ignore_eos=True))
        engine.submit([1], GREEDY, request_id="a")
        with pytest.raises(ValueError, match="request 'a' is here already"):
            engine.submit([1], GREEDY, request_id="a")
        drained = await engine.stop()
        return drained, (await answer.all()).choices[0], engine

    drained, answer, engine = asyncio.run(run())
    assert not drained
    assert answer.finish_reason == "abort"
    assert not engine.healthy
    idle(engine)


def test_readers_hear_of_a_failure(caplog):
    async def run():
        engine = engine_of()
        answer = engine.submit([1], GREEDY)
        engine._device._state = None
        engine.start()
        with pytest.raises(EngineStoppedError, match="the engine has failed: "):
            await answer.all()
        with pytest.raises(EngineStoppedError, match="the engine has failed: "):
            engine.submit([1], GREEDY)
        return engine

    engine = asyncio.run(run())
    assert engine.failure is not None
    assert not engine.healthy
    assert "the engine's thread failed" in caplog.text


@pytest.mark.slow
def test_quantized_and_adapted_checkpoints_are_served(tmp_path):
    rng = np.random.default_rng(5)

    def changed(path, leaf):
        if not path.endswith(("query/kernel", "down/kernel")):
            return leaf
        base = stack([grouped.quantize(matrix, bits=8, group=8) for matrix in leaf])
        layers, rows, columns = leaf.shape
        a, b = (
            jnp.asarray(rng.normal(scale=0.1, size=size), jnp.float32)
            for size in ((layers, rows, 2), (layers, 2, columns))
        )
        return LowRank(base, a, b, scale=0.5)

    params = map_with_path(changed, params_of())
    folder = save(tmp_path / "adapted", CONFIG, params, TOKENIZER.files())
    asked = prompts(3)
    with Engine.open(folder, SETTINGS) as engine:
        assert engine.model_name == "adapted"
        found = [result.token_ids for result in engine.generate(asked, GREEDY)]
    ready = prepared(params)
    options = {"max_new_tokens": NEW, "stop_tokens": (TOKENIZER.eos,)}
    assert found == [tuple(row) for row in generate(ready, asked, CONFIG, **options).lists()]


@pytest.mark.slow
def test_a_mesh_serves_the_same():
    layout = make_layout(make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2]))
    placed = jax.device_put(params_of(), partition(params_of(), rules(CONFIG), layout))
    settings = dataclasses.replace(SETTINGS, warm_up=True)
    with Engine(dataclasses.replace(checkpoint(), params=placed), settings, layout) as engine:
        assert engine.wait_ready(120)
        first = engine.generate(prompts(24)[:3], GREEDY)
        compiled = run_step._cache_size()
        again = engine.generate(prompts(24)[:3], GREEDY)
    assert [result.token_ids for result in first] == alone(24)[:3]
    assert [result.token_ids for result in again] == alone(24)[:3]
    assert run_step._cache_size() == compiled
