"""A grammar allows the ids, and only those, whose bytes keep the text in its form."""

import numpy as np
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("sentencepiece")
from sentencepiece_models import MODELS, as_tokenizer_json

from data import ByteTokenizer
from data.tokenizers import CharacterTokenizer, FileTokenizer, load_tokenizer
from serving.grammar import Grammars
from serving.structured import StructuredOutputs

TEXTS = ["the cat sat on the mat", "the dog, the café", "cats and dogs", "cat", "123 4567 é"]
CHOICES = ("the cat", "the cats", "café", "the", " the dog", "12 3", "\té\n", "ca|t")
TOKENIZERS = {
    "bytes": ByteTokenizer,
    "bpe": lambda: FileTokenizer.train(TEXTS * 50, 330),
    "characters": lambda: CharacterTokenizer("".join((*TEXTS, *CHOICES))),
    "llama": lambda: load_tokenizer({"tokenizer.model": MODELS["llama"]}),
    "nmt": lambda: load_tokenizer({"tokenizer.model": MODELS["nmt"]}),
    "gemma": lambda: FileTokenizer(as_tokenizer_json("gemma", False)),
}


def allowed(grammars, matcher):
    mask = grammars.masks([None, matcher])
    assert (mask[0] == 0xFFFFFFFF).all()
    return set(np.flatnonzero(np.unpackbits(mask[1].view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_masks_are_those_of_a_search_through_the_vocabulary(kind):
    """Choices, token by token, with a head that is wider than the vocabulary."""
    tokenizer = TOKENIZERS[kind]()
    table, wide = tokenizer.id_bytes(), tokenizer.vocab_size + 40
    special = set(tokenizer.special_tokens.values())
    assert all(not table[i] for i in special)
    ends = [] if tokenizer.eos is None else [tokenizer.eos]
    grammars = Grammars(tokenizer, wide, ends)
    rng, spelt = np.random.default_rng(0), set()
    wanted = {text.encode() for text in CHOICES}
    for _ in range(25):
        matcher = grammars.compile(StructuredOutputs(choice=CHOICES)).matcher()
        text = b""
        while not matcher.ended:
            nexts = {i for i, piece in enumerate(table) if piece and begins(text + piece, wanted)}
            nexts |= set(ends) if text in wanted else set()
            got = {i for i in allowed(grammars, matcher) if i < wide}
            assert got == nexts
            assert matcher.complete == (text in wanted)
            if not nexts:
                break
            token = int(rng.choice(sorted(nexts)))
            matcher.accept(token)
            text += table[token]
            if token in ends:
                break
        assert text in wanted
        spelt.add(text)
    assert len(spelt) > 3
    grammars.close()


def begins(text, wanted):
    return any(each.startswith(text) for each in wanted)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_of_ids_joined_are_their_text(kind):
    tokenizer = TOKENIZERS[kind]()
    table = tokenizer.id_bytes()
    before = tokenizer.encode(["the"])[0].tolist()
    for text in ("the cat", "café é 12", "the dog"):
        ids = tokenizer.encode([text])[0].tolist()
        longer = tokenizer.decode([*before, *ids])
        assert longer == tokenizer.decode(before) + b"".join(table[i] for i in ids).decode()


def test_a_dead_end_is_told_from_a_complete_answer():
    """A vocabulary without the letters that its grammar asks for, and without an end."""
    grammars = Grammars(CharacterTokenizer("ab"), 2, ())
    for regex, text, complete in (("a[c-d]", "a", False), ("a?", "a", True), ("", "", True)):
        matcher = grammars.compile(StructuredOutputs(regex=regex)).matcher()
        for character in text:
            matcher.accept("ab".index(character))
        assert matcher.ended or allowed(grammars, matcher).isdisjoint({0, 1})
        assert matcher.complete == complete
        assert matcher.failure is None


def test_what_the_library_cannot_follow_is_a_failure_and_not_an_end():
    many = {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(1500)}}
    grammars = Grammars(ByteTokenizer(), 258, [257])
    matcher = grammars.compile(StructuredOutputs(json=many)).matcher()
    matcher.accept(ord("{"))
    assert not allowed(grammars, matcher)
    assert "max is 2000" in matcher.failure
    assert not matcher.complete
    grammars.close()


def test_equal_forms_are_compiled_once_and_errors_name_their_own_field():
    grammars = Grammars(ByteTokenizer(), 258, [257])
    one = grammars.compile(StructuredOutputs(json={"type": "array"}))
    assert grammars.compile(StructuredOutputs(json='{"type": "array"}', param="tools")) is one
    assert grammars.compile(StructuredOutputs(regex="a")) is not one
    first, second = one.matcher(), one.matcher()
    first.accept(ord("["))
    assert allowed(grammars, second) == {ord("[")}
    bad = grammars.compile(StructuredOutputs(regex="("))
    for param in ("guided_regex", "structured_outputs"):
        with pytest.raises(ValueError, match=f"^{param} has a regex that cannot be used: unclosed"):
            bad.matcher(param)
    grammars.close()
