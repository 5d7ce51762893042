"""Text to ids and back: bytes, characters, and the tokenizer files of published models.

A tokenizer never adds tokens of its own: the store (data/store.py) puts the beginning and end of a
document, so they cannot be doubled; `encode_prompt` is for those who want what a model's files say.
Special tokens written out in text are ordinary text unless the caller allows them. `files()` is
what a checkpoint keeps and `load_tokenizer` reads back; the fingerprint is over those files.
"""

from data.tokenizers.files import load_tokenizer
from data.tokenizers.json_file import FileTokenizer
from data.tokenizers.own import ByteTokenizer, CharacterTokenizer
from data.tokenizers.protocol import DecodeStream, Tokenizer
from data.tokenizers.sentencepiece_model import SentencePieceTokenizer

__all__ = [
    "ByteTokenizer",
    "CharacterTokenizer",
    "DecodeStream",
    "FileTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
]
