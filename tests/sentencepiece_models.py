"""Tiny SentencePiece models for tests, trained on a few paragraphs of many scripts."""

from __future__ import annotations

import io

import sentencepiece
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers

PARAGRAPHS = [
    "All human beings are born free and equal in dignity and rights. They are endowed with reason.",
    "def area(radius):\n    # indented by four\n    return 3.14159 * radius ** 2\n",
    "Größe, naïve café, Ελληνικά, Кириллица; e\u0301 is two characters, \u0e01\u0e33 is Thai.",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。寒來暑往，秋收冬藏。",
    "Emoji: 😀 👩‍👩‍👧 🏳️‍🌈, then   three spaces\tand a tab. ﬁne ½ Ａ",
]


def trained(kind: str, **options) -> bytes:
    options = {"vocab_size": 400, "byte_fallback": True, "character_coverage": 0.98} | options
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PARAGRAPHS * 20),
        model_writer=model,
        model_type=kind,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS = {
    "llama": trained("bpe", **PLAIN),
    "gemma": trained("bpe", **PLAIN, add_dummy_prefix=False, user_defined_symbols=["<turn>"]),
    "nmt": trained("unigram", vocab_size=370),
}


def reference(kind: str):
    return sentencepiece.SentencePieceProcessor(model_proto=MODELS[kind])


def as_tokenizer_json(kind: str, prefix: bool) -> str:
    """A BPE model the way Llama 2 and Gemma publish theirs: normalizer, merges, decoder."""
    model = reference(kind)
    vocab = {model.id_to_piece(i): i for i in range(len(model))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and not piece.startswith("<")
    ]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = RustTokenizer(bpe)
    spaces = normalizers.Replace(" ", "▁")
    before = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*text, *strip])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str()
