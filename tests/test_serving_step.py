"""A request gets what it would get alone, whatever shares its steps, its pages and its slot."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.tpu_topology import compile_for, why_not
from model import ModelConfig, Runtime, abstract, forward, generate
from model.layers_apart import layers_apart
from serving import PagePool, Request, SamplingParams, Scheduler, SchedulerConfig
from serving.plan import ScheduledSequence
from serving.sampling import Variant
from serving.sampling_settings import Room, settings_of
from serving.step import Buckets, Step, admit, init_state, pack, run_step

CONFIG = ModelConfig(
    vocab_size=37, d_model=16, num_layers=3, num_heads=4, kv_heads=2, d_ff=24,
    layer_overrides=((1, "sliding_window", 4),),
)  # fmt: skip
REASON = why_not()
ROOM = Room(biases=2, ends=2, words=1, word_tokens=2)
PAGE, LENGTH, SLOTS = 4, 32, 3
BUCKETS = Buckets(tokens=(SLOTS, 8), sequences=(SLOTS,), pages=(LENGTH // PAGE,))
SHARED = list(range(9))
NEW = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW)
HOT = SamplingParams(temperature=1.3, top_p=0.9, max_tokens=9, seed=5)
WEARY = SamplingParams(
    temperature=0.0, max_tokens=NEW, repetition_penalty=1.4, presence_penalty=1.0
)
REQUESTS = [
    ([1, 2, 3], GREEDY),
    ([*SHARED, 30, 31, 32, 33, 34, 35, 36, 1, 2, 3, 4], GREEDY),
    ([*SHARED, 12], HOT),
    ([7], WEARY),
    ([*SHARED, 30, 31, 32, 33], GREEDY),
    ([2, 2, 5, 9], dataclasses.replace(HOT, seed=-3, min_p=0.02)),
]


@functools.cache
def params_of(config):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, abstract(config))


class Engine:
    """The loop around the step: admits, packs, and reads `late` steps after it sent."""

    def __init__(self, config=CONFIG, pages=24, late=0):
        self.params, self.config, self.late = params_of(config), config, late
        self.pool = PagePool(pages, PAGE)
        limits = SchedulerConfig(max_num_batched_tokens=8, max_num_seqs=SLOTS, watermark=0.0)
        self.scheduler = Scheduler(limits, self.pool)
        sizes = {"slots": SLOTS, "max_length": LENGTH, "pages": pages, "page_size": PAGE}
        self.state = init_state(self.params, config, Runtime(), room=ROOM, **sizes)
        self.tenants, self.mixed = {}, 0

    def admit(self, sequence):
        request = sequence.request
        tenant = (request, request.num_preemptions)
        if self.tenants.get(sequence.slot) != tenant:
            self.tenants[sequence.slot] = tenant
            length, choice = len(request.prompt), request.choice
            vocab = self.config.vocab_size
            options = {"prompt_length": length, "choice": choice, "room": ROOM}
            known = request.tokens(0, request.num_known)
            settings = settings_of(request.params, vocab, **options)
            self.state = admit(self.state, sequence.slot, known, settings)

    def send(self, plan):
        for sequence in plan.sequences:
            self.admit(sequence)
        counts = [sequence.stop - sequence.start for sequence in plan.sequences]
        self.mixed += min(counts) == 1 < max(counts)
        self.state, sampled = run_step(
            self.params, self.state, pack(plan.sequences, BUCKETS, PAGE),
            config=self.config, runtime=Runtime(), variant=Variant(),
        )  # fmt: skip
        return plan, sampled

    def read(self, plan, sampled):
        tokens = np.asarray(sampled.tokens)
        rows = (row for row, sequence in enumerate(plan.sequences) if sequence.samples)
        self.scheduler.update(plan, [int(tokens[row]) for row in rows])

    def run(self, requests):
        queue = [
            Request(str(i), prompt, params, LENGTH) for i, (prompt, params) in enumerate(requests)
        ]
        for request in queue:
            self.scheduler.add(request)
        sent = []
        while self.scheduler.num_live or sent:
            plan = self.scheduler.schedule()
            if plan.sequences:
                sent.append(self.send(plan))
            if len(sent) > self.late or not plan.sequences:
                self.read(*sent.pop(0))
        assert self.pool.num_free == self.pool.num_pages
        return [request.output for request in queue]


@functools.cache
def alone():
    """Each request in an engine of its own; greedy ones without penalties by `model.generate`."""
    greedy = [prompt for prompt, params in REQUESTS if params is GREEDY]
    made = generate(params_of(CONFIG), greedy, CONFIG, max_new_tokens=NEW).lists()
    return [
        made.pop(0) if request[1] is GREEDY else Engine().run([request])[0] for request in REQUESTS
    ]


@pytest.mark.parametrize(("pages", "late"), [(24, 0), (11, 1)])
def test_requests_that_share_steps_get_what_they_get_alone(pages, late):
    """Prompts in chunks beside decoding sequences, shared prefixes, too few pages, and steps sent
    before the last one is read.
    """
    engine = Engine(pages=pages, late=late)
    assert engine.run(REQUESTS) == alone()
    assert engine.mixed
    assert engine.scheduler.counters.prefix_hits
    assert bool(engine.scheduler.counters.preemptions) == (pages == 11)


def test_penalties_count_the_tokens_of_the_slot():
    """Greedy by hand with a full forward pass; the slot was another request's before."""
    prompt, params = [7, 3], dataclasses.replace(WEARY, frequency_penalty=0.5)
    engine = Engine()
    engine.run([([1, 2, 3, 3], HOT)])
    tokens = list(prompt)
    for _ in range(NEW):
        padded = jnp.asarray([tokens + [0] * (LENGTH - len(tokens))])
        z = np.array(apply(params_of(CONFIG), padded, CONFIG)[0][0, len(tokens) - 1], np.float64)
        made = tokens[len(prompt) :]
        for token in set(tokens):
            z[token] = z[token] / 1.4 if z[token] > 0 else z[token] * 1.4
            z[token] -= 0.5 * made.count(token) + (token in made)
        tokens.append(int(np.argmax(z)))
    assert engine.run([(prompt, params)]) == [tokens[len(prompt) :]]


apply = jax.jit(forward, static_argnames=("config",))


def decoding(sequences, width):
    """A step of one token of each sequence."""
    ones, numbers = np.ones(sequences, np.int32), np.arange(sequences + 1, dtype=np.int32)
    table = np.zeros((sequences, width), np.int32)
    return Step(numbers[:-1], ones, numbers, ones > 0, table, tokens=sequences, decodes=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_one_token_holds_one_cache(dtype):
    """Layers apart, as an engine on a CPU keeps them: pages are written in place."""
    runtime, params = Runtime(compute_dtype=dtype), layers_apart(params_of(CONFIG))
    sizes: dict = {"slots": 1, "max_length": 8, "pages": 2048, "page_size": PAGE}
    state = init_state(params, CONFIG, runtime, **sizes)
    options = {"config": CONFIG, "runtime": runtime, "variant": Variant(draws=False)}
    memory: Any = (
        run_step.lower(params, state, decoding(1, 2), **options).compile().memory_analysis()
    )
    pages = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.segments))
    assert memory.temp_size_in_bytes < pages / 10
    assert memory.alias_size_in_bytes >= pages


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(REASON is not None, reason=REASON or "libtpu compiles here")
def test_a_decoding_step_on_a_tpu_is_kernels_over_pages():
    """One that appends and one that attends, and the loop over layers copies no pages."""
    sizes: dict = {"vocab_size": 512, "d_model": 512, "num_layers": 2, "num_heads": 4}
    config = ModelConfig(**sizes, kv_heads=2, head_dim=128, d_ff=256)
    runtime = Runtime(compute_dtype="bfloat16")
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract(config)
    )
    sizes = {"slots": 16, "max_length": 512, "pages": 2048, "page_size": 16, "dtype": "bfloat16"}
    state = jax.eval_shape(lambda params: init_state(params, config, runtime, **sizes), params)
    options = {"config": config, "runtime": runtime, "variant": Variant()}
    run = lambda *arrays: run_step.__wrapped__(*arrays, **options)  # noqa: E731
    compiled = compile_for(run, (params, state, decoding(16, 32)), "v6e")
    assert sum(used > 0 for used in compiled.vmem_bytes) == 2
    assert compiled.temp_bytes < 2**22


def test_steps_that_do_not_fit_are_refused_by_name():
    request = Request("a", [1] * 9, GREEDY, LENGTH)
    sequence = ScheduledSequence(request, 0, 0, 9, (1,) * 9, (0, 1), True, False)
    with pytest.raises(ValueError, match="slot 0: positions 0 to 9 in 2 pages, which hold 8"):
        pack([sequence], BUCKETS, PAGE)
    fitting = dataclasses.replace(sequence, pages=(0, 1, 2))
    with pytest.raises(ValueError, match="9 tokens; the largest bucket is 8"):
        pack([fitting], BUCKETS, PAGE)
    learned = ModelConfig(
        vocab_size=37, d_model=16, num_layers=1, num_heads=2, positions="learned", max_length=16
    )
    sizes: dict = {"slots": 1, "max_length": 17, "pages": 1, "page_size": 1}
    with pytest.raises(ValueError, match="max_length is 17; the model has 16 learned positions"):
        init_state(params_of(learned), learned, Runtime(), **sizes)
    assert Buckets.up_to(100, 20, 6) == Buckets((16, 32, 64, 100), (8, 16, 20), (1, 2, 4, 6))
