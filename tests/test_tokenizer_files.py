"""Tokenizers of published models: ids and text are those of the libraries they were trained with.

The SentencePiece models are trained here; the sentencepiece library itself and transformers are the
references.
"""

from __future__ import annotations

import gzip
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from data import FileTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")
from sentencepiece_models import (  # noqa: E402
    MODELS,
    PARAGRAPHS,
    PLAIN,
    as_tokenizer_json,
    reference,
    trained,
)

UDHR = Path(__file__).parent.parent.parent / "shared" / "data" / "udhr.jsonl.gz"
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WORDS = st.lists(
    st.sampled_from(
        ["free", " and", "the ", "  ", "é", "😀", "天", "\n", "<s>", "</s>", "<turn>", "x"]
    )
).map("".join)


CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>"},
    "unk_token": "<unk>",
    "pad_token": None,
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "chat_template": "{{ messages }}",
    "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True, "normalized": False},
        "1": {"content": "<s>", "special": True, "normalized": False},
        "2": {"content": "</s>", "special": True, "normalized": False},
        "400": {"content": "<|end|>", "special": True, "normalized": False, "rstrip": True},
        "401": {"content": "<tool>", "special": False, "normalized": False},
    },
}


def folder_files(config: dict, kind: str = "llama") -> dict[str, bytes]:
    return {"tokenizer.model": MODELS[kind], "tokenizer_config.json": json.dumps(config).encode()}


LOADED = {kind: load_tokenizer({"tokenizer.model": model}) for kind, model in MODELS.items()}
JSONS = {
    kind: FileTokenizer(as_tokenizer_json(kind, kind == "llama")) for kind in ("llama", "gemma")
}
BPE = FileTokenizer.train(PARAGRAPHS, 300)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.decode_stream()
    return "".join([*(stream.push(i) for i in ids), stream.flush()])


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=60, deadline=None)
@given(text=UNICODE | WORDS)
@example(text=" led by a space")
@example(text="".join(PARAGRAPHS))
def test_ids_and_text_are_those_of_the_sentencepiece_library(kind, text):
    plain = text.replace("<turn>", "")
    ids = LOADED[kind].encode([plain])[0]
    assert ids.dtype == np.int32
    assert ids.tolist() == reference(kind).encode(plain)
    assert LOADED[kind].decode(ids) == reference(kind).decode(ids.tolist())
    if kind != "nmt":
        assert LOADED[kind].decode(ids) == plain.replace("▁", " ")
        assert JSONS[kind].encode([plain])[0].tolist() == ids.tolist()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(3, 399), max_size=12))
@example([3 + 0xE6, 3 + 0xBC, 3 + 0xA2, 3 + 0xFF, 3 + 0x41, 3 + 0xF0, 3 + 0x9F])
def test_any_ids_are_the_librarys_text_also_as_a_stream(ids):
    for kind, tokenizer in LOADED.items():
        known = [i for i in ids if i < len(reference(kind)) and not reference(kind).is_control(i)]
        if kind != "gemma" or LOADED[kind].special_tokens.get("<turn>") not in known:
            assert tokenizer.decode(known) == reference(kind).decode(known)
    for tokenizer in (*LOADED.values(), *JSONS.values(), BPE):
        with_special = [*ids, *tokenizer.special_tokens.values(), 3 + 0xE6, *ids]
        assert streamed(tokenizer, with_special) == tokenizer.decode(with_special)
    assert BPE.decode(ids) == RustTokenizer.from_str(BPE.files()["tokenizer.json"].decode()).decode(
        ids, skip_special_tokens=False
    )


@pytest.mark.skipif(not UDHR.is_file(), reason="the shared texts are not here")
def test_the_declaration_in_every_language_comes_back():
    with gzip.open(UDHR, "rt") as lines:
        texts = [json.loads(line)["text"][:400] for line in lines]
    rows = LOADED["llama"].encode(texts)
    assert [row.tolist() for row in rows] == reference("llama").encode(texts)
    for text, row in zip(texts, rows, strict=True):
        assert LOADED["llama"].decode(row) == text == streamed(LOADED["llama"], row.tolist())


def test_added_tokens_cut_the_text_and_legacy_says_whether_a_space_follows():
    text = "<s>free</s>and<|end|>  equal<tool>x"
    words = reference("llama")
    continuing = sentencepiece.SentencePieceProcessor(
        model_proto=trained("bpe", **PLAIN, add_dummy_prefix=False)
    )
    for legacy, model in ((True, words), (False, continuing)):
        tokenizer = load_tokenizer(folder_files({**CONFIG, "legacy": legacy}))
        assert (tokenizer.vocab_size, tokenizer.pad, tokenizer.unk) == (402, None, 0)
        parts = [model.encode(part) for part in ("free", "and", "equal", "x")]
        allowed = [1, *parts[0], 2, *parts[1], 400, *parts[2], 401, *parts[3]]
        assert tokenizer.encode([text], allow_special=True)[0].tolist() == allowed
        end = [words.encode("<s>free</s>and<|end|>  equal"), [401], model.encode("x")]
        assert tokenizer.encode([text])[0].tolist() == [i for part in end for i in part]
    assert tokenizer.decode(allowed) == text.replace("  ", "")


def test_a_special_token_that_the_model_would_read_by_itself_is_text_unless_allowed():
    config = {"additional_special_tokens": ["<turn>"]}
    gemma = load_tokenizer(folder_files(config, "gemma"))
    turn = reference("gemma").piece_to_id("<turn>")
    renamed = {str(reference("llama").piece_to_id("▁and")): {"content": "<|im|>", "special": True}}
    internlm = load_tokenizer(folder_files({"added_tokens_decoder": renamed, "legacy": False}))
    for tokenizer, special, written in (
        (gemma, turn, "<turn>"),
        (internlm, int(*renamed), "<|im|>"),
    ):
        text = f"a {written}{written} and the <<turn>>"
        plain = tokenizer.encode([text])[0].tolist()
        assert special not in plain
        assert tokenizer.decode(plain) == text
        allowed = tokenizer.encode([text], allow_special=True)[0].tolist()
        assert allowed.count(special) == text.count(written)
        assert tokenizer.decode(allowed) == text


def test_older_folders_say_it_in_two_more_files():
    files = {
        "tokenizer.model": MODELS["llama"],
        "added_tokens.json": b'{"<pad>": 400, "[tool]": 401}',
        "special_tokens_map.json": b'{"eos_token": {"content": "<unk>"}, "pad_token": "<pad>"}',
    }
    tokenizer = load_tokenizer(files)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (1, 0, 400, 402)
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 400}
    assert tokenizer.encode(["[tool]<pad>"])[0].tolist()[0] == 401


def test_what_the_config_adds_or_calls_special_holds_for_tokenizer_json():
    listed = {"300": {"content": "<new>", "special": True}, "301": {"content": "[x]"}}
    vocab = json.loads(BPE.files()["tokenizer.json"])["model"]["vocab"]
    word = max((token for token in vocab if token.isalpha() and token.isascii()), key=len)
    config = {"added_tokens_decoder": listed, "eos_token": word, "pad_token": "<new>"}
    files = {**BPE.files(), "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = load_tokenizer(files)
    assert (tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (vocab[word], 300, 302)
    assert tokenizer.encode(["[x]"])[0].tolist() == [301]
    assert 300 not in tokenizer.encode(["<new>"])[0].tolist()
    ids = [vocab[word], 300, 301]
    assert tokenizer.encode([f"{word}<new>[x]"], allow_special=True)[0].tolist() == ids
    assert tokenizer.decode(ids) == f"{word}<new>[x]"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "b"), ({"add_eos_token": True}, "be"), ({"add_bos_token": False}, "")],
)
def test_a_prompt_gets_what_the_config_says(settings, expected):
    tokenizer = load_tokenizer(folder_files({**CONFIG, **settings}))
    ids = tokenizer.encode(["free"])[0].tolist()
    wanted = [1] * ("b" in expected) + ids + [2] * ("e" in expected)
    assert tokenizer.encode_prompt("free").tolist() == wanted
    assert tokenizer.encode_prompt("free").dtype == np.int32


def test_a_prompt_gets_what_tokenizer_json_says_unless_the_config_does():
    rust = RustTokenizer.from_str(as_tokenizer_json("llama", True))
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    files = {"tokenizer.json": rust.to_str().encode()}
    assert load_tokenizer(files).encode_prompt("x").tolist() == rust.encode("x").ids
    files["tokenizer_config.json"] = b'{"add_bos_token": true}'
    assert load_tokenizer(files).encode_prompt("x").tolist() == rust.encode("x").ids[:-1]


def test_files_come_back_byte_for_byte_through_a_folder_a_mapping_and_pickle(tmp_path):
    files = folder_files(CONFIG) | {
        "chat_template.jinja": b"{{ 1 }}\n",
        "tool_use.jinja": b"{{ 2 }}",
        "special_tokens_map.json": b"{ }",
        "sub.json": b"{}",
    }
    expected = {name: data for name, data in files.items() if name != "sub.json"}
    for name, data in files.items():
        path = tmp_path / ("additional_chat_templates" if name == "tool_use.jinja" else "") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    for tokenizer in (load_tokenizer(tmp_path), load_tokenizer(files), load_tokenizer(expected)):
        assert isinstance(tokenizer, Tokenizer)
        again = pickle.loads(pickle.dumps(tokenizer))
        assert tokenizer.files() == again.files() == expected
        assert tokenizer.fingerprint == load_tokenizer(files).fingerprint
        assert again.encode(["free"])[0].tolist() == tokenizer.encode(["free"])[0].tolist()
    (tmp_path / "tokenizer.json").write_text(as_tokenizer_json("llama", True))
    assert isinstance(load_tokenizer(tmp_path), FileTokenizer)
    assert load_tokenizer(tmp_path).files().keys() == expected.keys() | {"tokenizer.json"}
    assert isinstance(load_tokenizer(tmp_path / "tokenizer.model"), SentencePieceTokenizer)


def test_bos_and_eos_given_by_a_caller_last_and_touch_only_the_config():
    given = load_tokenizer(folder_files(CONFIG), bos="<|end|>")
    kept = load_tokenizer(given.files())
    assert given.bos == kept.bos == 400
    assert kept.eos == 2
    assert given.files()["tokenizer.model"] == MODELS["llama"]
    config = json.loads(given.files()["tokenizer_config.json"])
    assert config == {**CONFIG, "bos_token": "<|end|>"}


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=40, deadline=None)
@given(text=WORDS | UNICODE, continued=st.booleans())
def test_spans_cover_the_text_in_order(kind, text, continued):
    for tokenizer in (LOADED[kind], BPE):
        ids, spans = tokenizer.encode_with_spans(text, True, continued)
        assert spans.shape == (len(ids), 2)
        if not continued:
            assert ids.tolist() == tokenizer.encode([text], allow_special=True)[0].tolist()
        assert (np.diff(spans[:, 0]) >= 0).all()
        assert (spans[:, 0] < spans[:, 1]).all()
        covered = {i for start, stop in spans.tolist() for i in range(start, stop)}
        assert kind == "nmt" or covered == set(range(len(text)))


def test_a_continued_text_gets_no_space_in_front():
    for tokenizer in (LOADED["llama"], JSONS["llama"]):
        whole = tokenizer.encode(["x free"])[0].tolist()
        first = tokenizer.encode(["x"])[0].tolist()
        assert first + tokenizer.encode_with_spans(" free", continued=True)[0].tolist() == whole
        assert tokenizer.encode_with_spans("free", continued=True)[1].tolist()[0][0] == 0


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast"])
@pytest.mark.interop
def test_vocab_and_merges_equal_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe = json.loads(BPE.files()["tokenizer.json"])["model"]
    vocab = {**bpe["vocab"], "<|endoftext|>": len(bpe["vocab"])}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"]), ""]
    files = {
        "vocab.json": json.dumps(vocab),
        "merges.txt": "\n".join(merges),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": name, "eos_token": "<|endoftext|>", "add_bos_token": True}
        ),
    }
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    theirs = getattr(transformers, name.removesuffix("Fast")).from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in [*PARAGRAPHS, "I'll  see 1234\n\n x", "a<|endoftext|>b", "e\u0301"]:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode([text], allow_special=True)[0].tolist() == expected
        assert ours.decode(expected) == theirs.decode(expected)
    if theirs.bos_token is not None:
        assert ours.encode_prompt("free").tolist() == theirs.encode("free")
    assert ours.eos == theirs.eos_token_id
    assert (
        ours.files().keys()
        == files.keys()
        == load_tokenizer(tmp_path / "merges.txt").files().keys()
    )


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.interop
def test_a_sentencepiece_folder_equals_transformers(legacy, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, data in folder_files({**CONFIG, "legacy": legacy}).items():
        (tmp_path / name).write_bytes(data)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    theirs.save_pretrained(tmp_path / "converted")
    converted = load_tokenizer(tmp_path / "converted")
    assert isinstance(converted, FileTokenizer)
    # Without a space in front: there transformers leaves SentencePiece's own out.
    texts = [*(text.strip() for text in PARAGRAPHS), "<s>free</s>and<|end|>  x<tool>free"]
    for text in texts:
        expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        for tokenizer in (ours, converted):
            ids, spans = tokenizer.encode_with_spans(text, allow_special=True)
            assert ids.tolist() == expected.input_ids
            assert [tuple(span) for span in spans.tolist()] == expected.offset_mapping
            assert tokenizer.decode(ids) == theirs.decode(expected.input_ids)
            assert tokenizer.encode_prompt(text, True).tolist() == theirs.encode(text)
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, None)


def test_without_the_sentencepiece_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"tokenizer\.model .* pip install 'sheaf\[hub\]'"):
        load_tokenizer(folder_files({}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.model": b"IQ== 0\n"}, r"tokenizer\.model: not a SentencePiece .* tiktoken"),
        ({"tokenizer.model": b""}, r"tokenizer\.model: not a SentencePiece model"),
        (folder_files({"sp_model_kwargs": {"alpha": 1}}), "sp_model_kwargs is {'alpha': 1}"),
        (folder_files({"bos_token": "<b>"}), "'<b>' is not in the tokenizer; .* <unk>, <s>, </s>"),
        (
            folder_files({"add_bos_token": "yes"}),
            "add_bos_token is 'yes'; it must be true",
        ),
        (folder_files({"added_tokens_decoder": {"x": {}}}), r"added_tokens_decoder\['x'\] is {}"),
        (
            folder_files({"added_tokens_decoder": {"400": {"content": "</s>"}}}),
            "'</s>' has id 400, but tokenizer.model gives it 2",
        ),
        (
            {"tokenizer.model": MODELS["llama"], "added_tokens.json": b"[]"},
            "holds list, not an obj",
        ),
        (
            {"tokenizer.model": MODELS["llama"], "tokenizer_config.json": b"{"},
            "config.json: not JSON",
        ),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b c"}, "line 1 is 'a b c'; it must be two"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b"}, "merges.txt do not fit"),
        (
            {
                "vocab.json": b'{"a": 0}',
                "merges.txt": b"",
                "tokenizer_config.json": b'{"tokenizer_class": "RobertaTokenizerFast"}',
            },
            "how RobertaTokenizer splits text .* give its tokenizer.json",
        ),
        (
            {
                "tokenizer.json": BPE.files()["tokenizer.json"],
                "tokenizer_config.json": b'{"added_tokens_decoder": {"7": {"content": "<new>"}}}',
            },
            "'<new>' has id 7, but the vocabulary gives it 300",
        ),
    ],
)
def test_wrong_files_are_named_with_what_would_be_right(files, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(files)
