"""Log-probabilities of texts: those of float64 and transformers, whatever is computed beside."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import pytest

from data import ByteTokenizer, FileTokenizer
from evals.batches import QuestionBatch, Room, plan
from evals.scoring import Scorer
from evals.spans import Span, pair_spans, rolling_spans
from model import ModelConfig, Runtime, init, rules
from serving.memory import Model
from sharding import MeshConfig, make_layout, make_mesh, partition
from weights import flatten

TOKENIZER = ByteTokenizer()
LONGEST = 100
CONFIG = ModelConfig(
    vocab_size=264, d_model=32, num_layers=2, num_heads=4, kv_heads=2, d_ff=48, max_length=LONGEST
)
QUESTION = "The capital of the country is one of four towns. Which one? "


@functools.cache
def params_of(dtype="float32"):
    drawn = init(CONFIG, jax.random.key(0))
    return jax.tree.map(
        lambda x: (x + 0.05 * np.sin(np.arange(x.size)).reshape(x.shape)).astype(dtype), drawn
    )


def scorer(budget=2048, dtype="float32", layout=None):
    params = params_of(dtype)
    if layout is not None:
        params = jax.device_put(params, partition(params, rules(CONFIG), layout))
    return Scorer(Model(params, CONFIG, Runtime(dtype, layout=layout)), LONGEST, budget)


def scored(found, spans):
    """Log-probabilities in order of the spans."""
    got = dict(pair for batch in found.score(spans) for pair in batch)
    assert sorted(got) == list(range(len(spans)))
    return [got[place] for place in range(len(spans))]


def logprobs(found, spans):
    return np.asarray([each.logprob for each in scored(found, spans)])


def random_spans(count=40):
    """Of all lengths, with one to many counted tokens."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, LONGEST + 2, count)
    sizes[:3] = (2, LONGEST + 1, LONGEST + 1)
    counts = [int(rng.choice([1, 40, size - 1])) for size in sizes]
    counts[2] = LONGEST
    return [
        Span(rng.integers(258, size=size).astype(np.int32), min(n, size - 1))
        for size, n in zip(sizes, counts, strict=True)
    ]


@functools.cache
def expected():
    return scored(scorer(), random_spans())


def wanted():
    return np.asarray([each.logprob for each in expected()])


def float64_decoder():
    """The model in NumPy, on the same numbers."""
    numpy_decoder = pytest.importorskip("numpy_decoder")
    wide = {p: np.asarray(w, np.float64) for p, w in flatten(params_of()).items()}

    def layer(index):
        def get(name):
            return next(w[index] for p, w in wide.items() if p.endswith(name))

        q, k, v, out = (get(f"attention/{n}/kernel").T for n in ("query", "key", "value", "output"))
        gate, up, down = (get(f"feed_forward/{n}/kernel").T for n in ("gate", "up", "down"))
        norms = get("attention_norm/scale"), get("feed_forward_norm/scale")
        return numpy_decoder.Layer(norms[0], q, k, v, out, norms[1], gate, up, down)

    return numpy_decoder.Decoder(
        wide["embed/table"], [layer(0), layer(1)], wide["final_norm/scale"],
        wide["head/kernel"].T, 8, CONFIG.norm_eps, rotate=numpy_decoder.rotate_half,
    )  # fmt: skip


def float64_score(decoder, span):
    """`(log-probability, whether each token is the likeliest)`."""
    rows = decoder(span.tokens[:-1])[-span.count :]
    peak = rows.max(1)
    log_z = peak + np.log(np.exp(rows - peak[:, None]).sum(1))
    targets = span.tokens[-span.count :]
    logprob = (rows[np.arange(span.count), targets] - log_z).sum()
    return logprob, bool((rows.argmax(1) == targets).all())


def test_values_are_those_of_a_float64_forward_pass():
    decoder = float64_decoder()
    for span, ours in list(zip(random_spans(), expected(), strict=True))[:12]:
        logprob, greedy = float64_score(decoder, span)
        assert ours.logprob == pytest.approx(logprob, abs=1e-4 * max(1, span.count**0.5))
        assert ours.greedy == greedy


def test_the_perplexity_of_a_long_document_is_that_of_float64():
    tokens = np.random.default_rng(5).integers(258, size=230).astype(np.int32)
    for stride in (None, 60):
        spans = rolling_spans(1, tokens, LONGEST, stride)
        decoder = float64_decoder()
        wanted = math.fsum(float64_score(decoder, span)[0] for span in spans)
        found = math.fsum(logprobs(scorer(), spans))
        assert math.exp(-found / 230) == pytest.approx(math.exp(-wanted / 230), rel=1e-6)


@pytest.mark.parametrize("budget", [1, 7 * 64])
def test_batch_size_and_order_change_nothing(budget):
    spans, order = random_spans(), np.random.default_rng(1).permutation(40)
    found = logprobs(scorer(budget), [spans[i] for i in order])
    assert np.abs(found - wanted()[order]).max() <= 2e-4


def test_bfloat16_depends_on_the_batch_by_rounding_only():
    spans = [Span(span.tokens[-20:], 1) for span in random_spans(16)]
    one, many = (logprobs(scorer(budget, "bfloat16"), spans) for budget in (1, 2048))
    assert np.abs(one - many).max() <= 3e-2


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_mesh_gives_what_one_device_gives(sizes):
    found = scorer(layout=make_layout(make_mesh(MeshConfig(**sizes))))
    assert np.abs(logprobs(found, random_spans()) - wanted()).max() <= 2e-4


def test_few_programs_are_compiled():
    found = scorer()
    scored(found, random_spans())
    lengths = {shape[1] for shape in found.work.programs}
    assert lengths == {64, 96, LONGEST}
    assert len(found.work.programs) <= 3 * 3


def test_the_chain_rule_holds():
    text = {"c": "Once upon a time", "a": " there was", "b": " a king."}
    pairs = [
        (text["c"], text["a"] + text["b"]),
        (text["c"], text["a"]),
        (text["c"] + text["a"], text["b"]),
        ("", text["c"]),
    ]
    both, first, second, start = logprobs(scorer(), pair_spans(TOKENIZER, pairs, LONGEST))
    assert both == pytest.approx(first + second, abs=1e-4)
    assert start < 0


def test_the_whole_vocabulary_has_probability_one_in_one_row():
    found, context = scorer(), np.arange(9, dtype=np.int32)
    spans = [Span(np.append(context, token).astype(np.int32), 1) for token in range(264)]
    scores = scored(found, spans)
    assert math.fsum(math.exp(each.logprob) for each in scores) == pytest.approx(1, abs=1e-5)
    assert sum(each.greedy for each in scores) == 1
    assert (found.work.rows, found.work.tokens) == (1, 9)


def test_options_of_one_token_share_their_question():
    pairs = [(QUESTION, f" {letter}") for letter in "ABCD"]
    spans = pair_spans(TOKENIZER, pairs, LONGEST)
    together, alone = scorer(), scorer()
    shared = logprobs(together, spans)
    apart = [logprobs(alone, [span])[0] for span in spans]
    assert np.abs(shared - apart).max() <= 1e-5
    assert np.argmax(shared) == np.argmax(apart)
    assert alone.work.tokens >= 3 * together.work.tokens


def questions():
    """Spans of six questions, whose options have several tokens, some all but the last in common;
    and of two that have only one.
    """
    rng, spans = np.random.default_rng(2), []
    lengths, sizes_of = (50, 88, 61, 40, 92, 70, 33, 90), (*[(4, 7, 1, 5)] * 6, (3,), (9,))
    for length, sizes in zip(lengths, sizes_of, strict=True):
        context = rng.integers(258, size=length)
        tails = [rng.integers(258, size=size) for size in sizes]
        tails += [np.append(tails[0][:-1], 5)] if len(sizes) > 1 else []
        spans += [Span(np.append(context, t).astype(np.int32), len(t)) for t in tails]
    return spans


@pytest.mark.parametrize("sizes", [None, {"data": 4, "tensor": 2}])
def test_options_of_several_tokens_share_their_question(sizes):
    layout = None if sizes is None else make_layout(make_mesh(MeshConfig(**sizes)))
    together, spans = scorer(layout=layout), questions()
    found, decoder = scored(together, spans), float64_decoder()
    for span, ours in zip(spans, found, strict=True):
        logprob, greedy = float64_score(decoder, span)
        assert ours.logprob == pytest.approx(logprob, abs=2e-4)
        assert ours.greedy == greedy
    assert together.work.rows == 8
    contexts = sum(len(span.tokens) - span.count for span in spans[::5][:6])
    assert together.work.tokens < contexts + sum(span.count for span in spans) + 33 + 90


def test_questions_are_shared_only_where_that_saves_and_fits():
    def shared(spans, **room):
        planned = plan(spans, Room(**{"max_length": LONGEST, "token_budget": 2048, **room}))
        return sum(len(each.questions) for each in planned if isinstance(each, QuestionBatch))

    assert shared(questions()) == 6
    assert shared(questions(), alone=True) == 0
    assert shared(questions(), hard=True) == 3  # Padding behind the three longest has no positions.
    assert shared(questions(), token_budget=80) == 0
    short = [Span(np.append(0, np.full(60, word)).astype(np.int32), 60) for word in range(40)]
    assert shared(short) == 0, "documents after one BOS are not a question with options"


def test_windows_predict_each_token_once():
    tokens = np.arange(100, 110)
    spans = rolling_spans(1, tokens, window=4)
    assert [span.count for span in spans] == [4, 4, 2]
    assert [span.tokens.tolist() for span in spans] == [
        [1, 100, 101, 102, 103],
        [103, 104, 105, 106, 107],
        [105, 106, 107, 108, 109],
    ]
    for stride in (1, 2, 3):
        spans = rolling_spans(1, tokens, 4, stride)
        counted = np.concatenate([span.tokens[-span.count :] for span in spans])
        assert counted.tolist() == tokens.tolist()
        assert all(len(span.tokens) == 5 for span in spans)
    document = TOKENIZER.encode(["a whole document that fits"])[0]
    [span] = rolling_spans(256, document, LONGEST)
    [pair] = pair_spans(TOKENIZER, [("", "a whole document that fits")], LONGEST)
    assert (span.tokens.tolist(), span.count) == (pair.tokens.tolist(), pair.count)
    with pytest.raises(ValueError, match="stride"):
        rolling_spans(1, tokens, 4, 5)


def test_a_continuation_is_what_the_whole_text_adds():
    words = ["the cat sat on the mat", "there the other cats sat"] * 20
    tokenizer = FileTokenizer.train(iter(words), 300)
    for context, continuation, count in [
        ("the cat ", "sat", 1),
        ("the cat", " sat", 1),
        ("the cat", " sat on", 2),
        ("the c", "at sat", 2),  # The context ends in the middle of a token.
    ]:
        [span] = pair_spans(tokenizer, [(context, continuation)], 50)
        whole = tokenizer.encode([context + continuation])[0]
        assert (span.tokens[-len(whole) :].tolist(), span.count) == (whole.tolist(), count)


def test_long_contexts_lose_their_beginning_and_say_so():
    [span] = pair_spans(TOKENIZER, [("x" * 30, "yz")], 10)
    assert (len(span.tokens), span.count, span.cut) == (11, 2, 21)
    with pytest.raises(ValueError, match="11 tokens, more than the 10"):
        pair_spans(TOKENIZER, [("x", "y" * 11)], 10)
    with pytest.raises(ValueError, match="no token"):
        pair_spans(TOKENIZER, [("x", "")], 10)


SMALL = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "Llama": {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128},
    "GPT2": {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "Gemma2": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8,
               "query_pre_attn_scalar": 8, "sliding_window": 16},
}  # fmt: skip


@pytest.mark.interop
@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_scores_as_in_transformers(family, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family_checks = pytest.importorskip("family_checks")
    from model.families import import_checkpoint

    theirs = family_checks.random_model(
        getattr(transformers, f"{family}Config")(**FAMILIES[family])
    )
    theirs.save_pretrained(tmp_path)
    found = import_checkpoint(tmp_path)
    ours = Scorer(Model(found.params, found.config, Runtime()), 128)
    pairs = [(QUESTION, " The one in the north."), ("", "A text."), (QUESTION[:9], "x")]
    spans = pair_spans(TOKENIZER, pairs, 128)
    for span, got in zip(spans, logprobs(ours, spans), strict=True):
        rows = family_checks.their_logits(theirs, span.tokens[None, :-1])[0][-span.count :]
        rows = rows.astype(np.float64)
        log_z = np.log(np.exp(rows).sum(1))
        wanted = (rows[np.arange(span.count), span.tokens[-span.count :]] - log_z).sum()
        assert got == pytest.approx(wanted, abs=1e-4)
