"""Everything between files that somebody has and the batch a step sees.

`build(config)` gives a `Dataset`: `dataset.train.batch_at(step)` is the batch of any step, on any
number of hosts, and `python -m data show --config=… --step=N` prints the documents behind it.
"""

from data.chat import ChatTemplate, ChatTemplateError, encode_chat, encode_chat_with_mask
from data.config import DataConfig, PhaseConfig, SourceConfig, TokenizerConfig, from_mapping
from data.dataset import Dataset, build
from data.loader import BatchIterator, Loader, Origin, ValidationLoader
from data.order import Mixture, Order, Phase, permute, unpermute
from data.packing import Spans, make_plan
from data.proportions import proportional, temperature, unimax
from data.record import check_resume
from data.sources import BadRowError, Row, Source, SourceError, open_source
from data.store import StoreOptions, TokenStore
from data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    DecodeStream,
    FileTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from data.tokenizing import tokenize

__all__ = [
    "BadRowError",
    "BatchIterator",
    "ByteTokenizer",
    "CharacterTokenizer",
    "ChatTemplate",
    "ChatTemplateError",
    "DataConfig",
    "Dataset",
    "DecodeStream",
    "FileTokenizer",
    "Loader",
    "Mixture",
    "Order",
    "Origin",
    "Phase",
    "PhaseConfig",
    "Row",
    "SentencePieceTokenizer",
    "Source",
    "SourceConfig",
    "SourceError",
    "Spans",
    "StoreOptions",
    "TokenStore",
    "Tokenizer",
    "TokenizerConfig",
    "ValidationLoader",
    "build",
    "check_resume",
    "encode_chat",
    "encode_chat_with_mask",
    "from_mapping",
    "load_tokenizer",
    "make_plan",
    "open_source",
    "permute",
    "proportional",
    "temperature",
    "tokenize",
    "unimax",
    "unpermute",
]
