"""Text out: streamed and at once are one text, cut where the first stop string ends."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizers import ByteTokenizer, CharacterTokenizer, FileTokenizer
from serving.request import Request, State
from serving.sampling_params import SamplingParams, banned_sequences
from serving.text_out import TextOut

LINES = [
    "the cat sat on the mat",
    "Größe, naïve café 天地玄黃 😀 👩‍👩‍👧",
    "stop stopping at the stop",
] * 40
BYTES = ByteTokenizer()
_TRAINED: list = []


def tokenizers():
    """Bytes, characters, byte-level BPE, and SentencePiece's way of spaces and bytes."""
    if not _TRAINED:
        sentencepiece_models = pytest.importorskip("sentencepiece_models")
        written = sentencepiece_models.as_tokenizer_json("llama", prefix=True)
        _TRAINED.extend(
            [
                BYTES,
                CharacterTokenizer("".join(LINES)),
                FileTokenizer.train(LINES, 320),
                FileTokenizer(written, "<s>", "</s>"),
            ]
        )
    return _TRAINED


def params(max_tokens=None, **fields):
    return SamplingParams(seed=0, max_tokens=max_tokens, **fields)


def streamed(tokenizer, ids, prompt=(), **fields):
    """All pieces, the string that stopped, and the tokens that count."""
    out = TextOut(tokenizer, params(**fields), prompt)
    pieces = [out.push(token) for token in ids]
    pieces.append(out.end())
    stops = [piece.stop for piece in pieces if piece.stop is not None]
    assert len(stops) <= 1
    return [piece.text for piece in pieces], stops[0] if stops else None, out.num_tokens


def cut(text, stops, include):
    """The definition: the match that ends first, of those the one that begins first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            start = min(starts)
            return text[: end if include else start], text[start:end]
    return text, None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32).map(random.Random))
def test_streamed_text_is_the_text_of_all_ids_cut_at_the_first_stop_string(rng):
    for tokenizer in tokenizers():
        for ids in (
            [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 30))],
            list(tokenizer.encode([rng.choice(LINES)])[0]),
        ):
            whole = tokenizer.decode(ids)
            cuts = [
                sorted(rng.choices(range(len(whole) + 1), k=2)) for _ in range(rng.randint(0, 3))
            ]
            stops = [whole[a : min(b, a + 6)] for a, b in cuts if a < b]
            stops += rng.sample(["zz", "\ufffd", "at the", "t\ufffd"], rng.randint(0, 2))
            include = rng.random() < 0.5
            pieces, stop, count = streamed(
                tokenizer,
                ids,
                stop=stops,
                include_stop_str_in_output=include,
                skip_special_tokens=False,
            )
            assert ("".join(pieces), stop) == cut(whole, stops, include)
            assert stop is not None or count == len(ids)


def test_only_what_may_become_a_stop_string_is_held_back():
    ids = BYTES.encode(["ab abab abcd!"])[0]
    pieces, stop, count = streamed(BYTES, ids, stop=["abc", "cde"])
    assert pieces[:8] == ["", "", "ab ", "", "", "ab", "", "ab "]
    assert "".join(pieces) == "ab abab "
    assert (stop, count) == ("abc", 11)
    # Nothing is held that no stop string begins with.
    assert streamed(BYTES, ids, stop=["zzzzzzzzzz"])[0][:3] == ["a", "b", " "]


def test_the_match_that_ends_first_wins_then_the_one_that_begins_first():
    ids = BYTES.encode(["xabcdy"])[0]
    assert streamed(BYTES, ids, stop=["abcd", "bc"])[1] == "bc"
    assert streamed(BYTES, ids, stop=["c", "abc", "bc"])[1] == "abc"
    # The same in one token that holds all of it.
    whole = FileTokenizer.train(["xabcdy"] * 50, 300)
    assert len(whole.encode(["xabcdy"])[0]) == 1
    for stops, stop, text in [(["abcd", "bc"], "bc", "xa"), (["c", "abc"], "abc", "x")]:
        pieces, found, count = streamed(whole, whole.encode(["xabcdy"])[0], stop=stops)
        assert ("".join(pieces), found, count) == (text, stop, 1)


def test_tokens_after_the_stop_are_dropped_and_not_counted():
    ids = list(BYTES.encode(["one STOP two"])[0])
    out = TextOut(BYTES, params(stop="STOP"))
    text = "".join(out.push(token).text for token in ids)
    assert (text, out.num_tokens) == ("one ", 8)
    assert out.end(ids[0]) == out.push(ids[0]) == type(out.end())()


def test_no_stop_string_counts_before_the_least_number_of_tokens():
    ids = BYTES.encode(["aXbXXcX"])[0]
    for least, text in [(0, "a"), (2, "a"), (3, "aXb"), (5, "aXbX"), (6, "aXbXXc"), (8, "aXbXXcX")]:
        assert "".join(streamed(BYTES, ids, stop="X", min_tokens=least)[0]) == text
    # A match that was passed over stays so, though its text is still held for a longer one.
    held = streamed(BYTES, BYTES.encode(["abx"])[0], stop=["b", "abc"], min_tokens=3)
    assert ("".join(held[0]), held[1]) == ("abx", None)
    # Of a match that was passed over, the end may still begin the next.
    assert "".join(streamed(BYTES, BYTES.encode(["aaab"])[0], stop="aa", min_tokens=3)[0]) == "a"


def test_an_answer_continues_its_prompt():
    *_, sentencepiece = tokenizers()
    for tokenizer in (BYTES, sentencepiece):
        text = "All human beings are born free"
        ids = [int(token) for token in tokenizer.encode([text])[0]]
        for at in range(1, len(ids)):
            rest = "".join(streamed(tokenizer, ids[at:], prompt=ids[:at])[0])
            assert tokenizer.decode(ids[:at]) + rest == text
    # A character that begins in the prompt is completed; none of the prompt's stop strings counts.
    emoji = BYTES.encode(["go 😀"])[0]
    pieces, stop, _ = streamed(BYTES, emoji[5:], prompt=emoji[:5], stop="go")
    assert ("".join(pieces), stop) == ("😀", None)
    # What never becomes a character is shown as such.
    assert "".join(streamed(BYTES, emoji[:5])[0]) == "go \ufffd"


def test_special_tokens_are_text_only_where_asked_for():
    ids = [104, 105, BYTES.bos, 33]
    assert "".join(streamed(BYTES, ids)[0]) == "hi!"
    assert "".join(streamed(BYTES, ids, skip_special_tokens=False)[0]) == "hi<|bos|>!"
    for token, skip, text in [
        (BYTES.eos, True, "hi"),
        (BYTES.eos, False, "hi<|eos|>"),
        (33, True, "hi"),
        (33, False, "hi"),
    ]:
        out = TextOut(BYTES, params(skip_special_tokens=skip, stop_token_ids=[33]))
        shown = "".join(out.push(t).text for t in ids[:2]) + out.end(token).text
        assert (shown, out.num_tokens) == (text, 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32).map(random.Random))
def test_a_requests_text_is_the_same_however_many_tokens_come_at_once(rng):
    given_ids = [rng.choice([97, 98, 99, 240, 159, 152, 128]) for _ in range(20)] + [BYTES.eos]
    fields = {"stop": ["abc", "cab"], "stop_token_ids": [99], "max_tokens": rng.randint(1, 25)}
    fields |= {"min_tokens": rng.randint(0, fields["max_tokens"])}
    if rng.random() < 0.5:
        del fields["stop_token_ids"]
    results = set()
    for most in (1, 3, 40):
        request = Request("r", [1], params(**fields), 1000, frozenset({BYTES.eos}))
        out, text, stop, queue = TextOut(BYTES, request.params, [1]), "", None, list(given_ids)
        while stop is None and not request.state.finished:
            for _ in range(rng.randint(1, most)):
                if queue and not request.state.finished:
                    request.append(queue.pop(0))
                elif not request.state.finished:
                    request.state = State.FINISHED_LENGTH
            piece = out.take(request)
            text, stop = text + piece.text, piece.stop
        reason = "stop" if stop else request.finish_reason
        results.add((text, stop, reason, out.num_tokens))
        assert out.take(request).text == ""
    assert len(results) == 1
    ((text, stop, _, count),) = results
    assert text == BYTES.decode(given_ids[:count])[: len(text)]
    assert stop is None or BYTES.decode(given_ids[:count]).endswith(stop)


def test_banned_words_are_spelt_as_inside_a_text():
    *_, sentencepiece = tokenizers()
    free = banned_sequences(["free", " free"], sentencepiece)
    assert len(free) == 2
    text = list(map(int, sentencepiece.encode(["All human beings are born free"])[0]))
    assert any(tuple(text[-len(ids) :]) == ids for ids in free)
    assert [sentencepiece.decode(ids).strip() for ids in free] == ["free", "free"]
    assert banned_sequences(["ab"], BYTES) == ((97, 98), (32, 97, 98))


def test_the_work_of_a_token_does_not_grow_with_the_text():
    stops = ["".join(random.Random(i).choices("ab", k=40)) for i in range(32)]
    out = TextOut(BYTES, params(stop=stops))
    for token in [97, 98] * 2000:
        out.push(token)
        assert len(out._held) < 40
