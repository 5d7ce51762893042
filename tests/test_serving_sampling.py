"""A request gets the distribution that its settings define, whatever rows stand beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serving.checks import ParameterError
from serving.sampling import NOTHING, Rows, Variant, sample
from serving.sampling_params import SamplingParams
from serving.sampling_settings import Room, settings_of

VOCAB, PADDED = 41, 44
ROOM = Room(biases=4, ends=3, words=2, word_tokens=3)
ENDS = (5, 40)
sampled = jax.jit(sample, static_argnames="variant")


@dataclasses.dataclass
class Case:
    """One row: its settings, and the sequence so far."""

    params: SamplingParams
    prompt: list[int] = dataclasses.field(default_factory=list)
    output: list[int] = dataclasses.field(default_factory=list)
    banned: tuple[tuple[int, ...], ...] = ()
    choice: int = 0


def rows_of(cases):
    """The device's view of cases, each in a slot of its own."""
    seen = np.zeros((len(cases), PADDED), np.int32)
    recent, settings = [], []
    for row, case in enumerate(cases):
        np.add.at(seen[row], case.output, 2)
        seen[row, case.prompt] |= 1
        recent.append(([-1, -1, *case.output])[-2:])
        options = {"prompt_length": len(case.prompt), "choice": case.choice, "end_ids": ENDS}
        made = settings_of(case.params, PADDED, banned=case.banned, room=ROOM, **options)
        settings.append(made)
    lengths = [len(case.prompt) + len(case.output) for case in cases]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *settings)
    arrays = (np.asarray(x, np.int32) for x in (lengths, recent, seen, range(len(cases))))
    return Rows(stacked, *arrays)


def probabilities(logits, case):
    """The definition in float64: what a row of logits may become, and how likely each is."""
    p, z = case.params, np.asarray(logits[:VOCAB], np.float64)
    if p.allowed_token_ids is not None:
        z = np.where(np.isin(np.arange(VOCAB), p.allowed_token_ids), z, -np.inf)
    for *start, last in case.banned:
        if not start or case.output[-len(start) :] == start:
            z[last] = -np.inf
    if len(case.output) < p.min_tokens:
        z[[*p.stop_token_ids, *ENDS]] = -np.inf
    for token, bias in p.logit_bias.items():
        z[token] += bias
    for token in {*case.prompt, *case.output}:
        factor = p.repetition_penalty
        z[token] = z[token] / factor if z[token] > 0 else z[token] * factor
    for token in set(case.output):
        z[token] -= p.frequency_penalty * case.output.count(token) + p.presence_penalty
    if p.temperature == 0.0:
        return np.eye(VOCAB)[int(np.argmax(z))]
    z = z / p.temperature
    shares = softmax(z)
    z = np.where(shares < p.min_p * shares.max(), -np.inf, z)
    if p.top_k:
        z = np.where(z < np.sort(z)[::-1][p.top_k - 1], -np.inf, z)
    shares = softmax(z)
    better = np.asarray([shares[z > value].sum() for value in z])
    return softmax(np.where((better < p.top_p) | (p.top_p == 1.0), z, -np.inf))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def drawn_cases(count, seed=0):
    """Cases with every setting, in many combinations."""
    rng = np.random.default_rng(seed)
    some = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    ids = lambda n: [int(i) for i in rng.integers(0, VOCAB, n)]  # noqa: E731
    for row in range(count):
        output = ids(rng.integers(0, 9))
        params = SamplingParams(
            temperature=some(0.0, 0.5, 1.0, 1.7),
            top_k=some(0, 0, 1, 5, 41),
            top_p=some(1.0, 1.0, 0.3, 0.9),
            min_p=some(0.0, 0.0, 0.02, 0.5),
            repetition_penalty=some(1.0, 0.7, 1.6),
            presence_penalty=some(0.0, 0.9, -1.0),
            frequency_penalty=some(0.0, 0.4, -0.2),
            logit_bias={token: float(some(-100, -1, 2, 100)) for token in ids(some(0, 0, 3))},
            allowed_token_ids=some(None, None, tuple(ids(9))),
            min_tokens=some(0, 4),
            stop_token_ids=tuple(ids(1)),
            seed=row,
            logprobs=1,
        )
        banned = some((), ((3,), (*output[-2:], 7)), ((1, 2, 8), (9, 9)))
        yield Case(params, ids(4), output, banned)


def test_every_setting_leaves_the_distribution_of_the_definition():
    """The rows of one batch differ in all settings; logits in steps of a half have many ties."""
    cases = list(drawn_cases(96))
    logits = np.random.default_rng(1).normal(scale=2.0, size=(len(cases), PADDED))
    logits[::3] = np.round(logits[::3] * 2) / 2
    logits = logits.astype(np.float32)
    variant = Variant(logprobs=PADDED, processed=True, vocab_size=VOCAB)
    out = sampled(logits, rows_of(cases), variant=variant)
    made = np.zeros((len(cases), PADDED))
    np.put_along_axis(made, np.asarray(out.top_tokens), np.exp(np.asarray(out.top_logprobs)), 1)
    for row, case in enumerate(cases):
        expected = probabilities(logits[row], case)
        token = int(out.tokens[row])
        assert expected[token] > 0, case
        if case.params.temperature > 0:
            np.testing.assert_allclose(made[row, :VOCAB], expected, atol=2e-6, err_msg=str(case))
            assert not made[row, VOCAB:].any()


def test_many_draws_match_the_distribution():
    """Pearson's chi-square of 4096 draws, each at another position, hence from another key."""
    params = SamplingParams(temperature=0.8, top_p=0.95, min_p=0.01, seed=11)
    case = Case(dataclasses.replace(params, logit_bias={2: 1.0}, presence_penalty=0.5), [], [4])
    logits = np.random.default_rng(3).normal(scale=1.5, size=PADDED).astype(np.float32)
    count = 4096
    rows = jax.tree.map(lambda x: np.repeat(x, count, axis=0), rows_of([case]))
    rows = dataclasses.replace(
        rows,
        positions=np.arange(count, dtype=np.int32),
        slots=np.zeros(count, np.int32),
        seen=rows.seen[:1],
    )
    out = sampled(np.tile(logits, (count, 1)), rows, variant=Variant(vocab_size=VOCAB))
    expected = count * probabilities(logits, case)
    observed = np.bincount(np.asarray(out.tokens), minlength=VOCAB)
    possible = expected > 0
    assert not observed[~possible].any()
    degrees = possible.sum() - 1
    statistic = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)


def test_a_draw_depends_on_seed_choice_position_and_logits_only():
    """Not on slot, batch or bucket; and it is the documented one, so it can be made again."""
    cases = list(drawn_cases(16, seed=5))
    cases[3] = Case(SamplingParams(temperature=1.0, seed=2**40 + 7), [1, 2], [3], choice=2)
    cases[4] = Case(SamplingParams(temperature=1.0, seed=-9), [1, 2], [3, 4])
    logits = np.random.default_rng(2).normal(size=(16, PADDED)).astype(np.float32)
    variant = Variant(vocab_size=VOCAB)
    together = np.asarray(sampled(logits, rows_of(cases), variant=variant).tokens)
    order = np.random.default_rng(0).permutation(16)[:5]
    apart = sampled(logits[order], rows_of([cases[i] for i in order]), variant=variant).tokens
    np.testing.assert_array_equal(apart, together[order])
    for row, words in ((3, [2**8, 7]), (4, [2**32 - 1, 2**32 - 9])):
        key = jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl="threefry2x32")
        position = len(cases[row].prompt) + len(cases[row].output)
        key = jax.random.fold_in(jax.random.fold_in(key, cases[row].choice), position)
        noise = jax.random.gumbel(key, (PADDED,), jnp.float32)[:VOCAB]
        assert together[row] == int(jnp.argmax(logits[row, :VOCAB] + noise))


def test_log_probabilities_are_the_models_own_and_grammar_rules_what_is_drawn():
    asked = [SamplingParams(temperature=t, top_k=3, seed=1, logprobs=3) for t in (0.0, 1.0, 1.0)]
    cases = [Case(params, [2], [3]) for params in asked]
    logits = np.random.default_rng(4).normal(size=(3, PADDED)).astype(np.float32)
    grammar = np.zeros((3, 2), np.uint32)
    grammar[0, 17 // 32], grammar[1, 33 // 32] = 1 << 17, 1 << (33 - 32)
    variant = Variant(logprobs=3, vocab_size=VOCAB)
    out = sampled(logits, rows_of(cases), variant=variant, grammar=grammar)
    np.testing.assert_array_equal(out.tokens, [17, 33, NOTHING])
    for row, token in enumerate((17, 33)):
        expected = np.log(softmax(logits[row, :VOCAB].astype(np.float64)))
        ranked = np.argsort(-expected)
        np.testing.assert_allclose(out.logprobs[row], expected[token], atol=1e-5)
        np.testing.assert_array_equal(out.top_tokens[row], ranked[:3])
        np.testing.assert_allclose(out.top_logprobs[row], expected[ranked[:3]], atol=1e-5)
        assert int(out.ranks[row]) == 1 + list(ranked).index(token)


@pytest.mark.parametrize(
    ("params", "banned", "message"),
    [
        (SamplingParams(), (), "seed is not set"),
        (
            SamplingParams(seed=1, logit_bias=dict.fromkeys(range(5), 1)),
            (),
            "logit_bias has 5 .* 4",
        ),
        (SamplingParams(seed=1), ((1, 2, 3, 4),), "bad_words has a word of 4 tokens.* 3"),
        (SamplingParams(seed=1), ((1,), (2,), (3,)), "bad_words has 3 entries.* 2"),
    ],
)
def test_what_has_no_room_names_its_field(params, banned, message):
    with pytest.raises(ParameterError, match=message):
        settings_of(params, PADDED, banned=banned, room=ROOM)
