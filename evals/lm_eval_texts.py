"""How lm-eval's `hf` model cuts texts into tokens, for ours (`evals/lm_eval.py`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np

from data.tokenizers import Tokenizer
from evals.spans import Span, prefix_token, rolling_spans
from serving import SamplingParams

Ids = list[int]
logger = logging.getLogger(__name__)


class Texts:
    """From texts to tokens and back, as lm-eval's `hf` model does it with transformers.

    prefix: what stands before a text with nothing before it. front: what texts begin with.
    end: the text of EOS, if there is one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        prefix: int | None = None,
        add_bos: bool | None = None,
    ) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._special = frozenset(tokenizer.special_tokens.values())
        if add_bos and tokenizer.bos is None:
            raise ValueError("add_bos_token is true, and the tokenizer has no BOS token")
        self.prefix = prefix_token(tokenizer) if prefix is None else prefix
        own = tokenizer.prompt_prefix if add_bos is None else ((tokenizer.bos,) if add_bos else ())
        self.front: tuple[int, ...] = tuple(int(i) for i in own if i is not None)
        self.end = None if tokenizer.eos is None else tokenizer.decode([tokenizer.eos])
        self._begun = tokenizer.decode([self.prefix])

    def encode(self, texts: Iterable[str], front: bool = True) -> dict[str, Ids]:
        """`{text: ids}`, the different texts in one go; a text that begins with the prefix's own
        text has it already.
        """
        distinct = list(dict.fromkeys(texts))
        encoded = self._tokenizer.encode(distinct, allow_special=True)
        return {
            text: [*(self.front if front and not self._is_begun(text) else ()), *ids.tolist()]
            for text, ids in zip(distinct, encoded, strict=True)
        }

    def _is_begun(self, text: str) -> bool:
        return bool(self._begun) and text.startswith(self._begun)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode([i for i in ids if i not in self._special])

    def roles(self) -> dict[str, str]:
        """The texts of BOS and EOS as chat templates know them."""
        ids = {"bos_token": self._tokenizer.bos, "eos_token": self._tokenizer.eos}
        return {name: self._tokenizer.decode([i]) for name, i in ids.items() if i is not None}

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Span]:
        """The spans of (context, continuation): white space at the end of a context goes to the
        continuation, whole and context are encoded, and what the whole has beyond as many tokens
        as the context has follows these.
        """
        moved = [_move_space(context, continuation) for context, continuation in pairs]
        whole = self.encode(context + rest for context, rest in moved if context)
        whole_alone = self.encode((rest for context, rest in moved if not context), front=False)
        heads = self.encode(context for context, _ in moved if context)
        spans = []
        for (context, rest), pair in zip(moved, pairs, strict=True):
            ids = whole[context + rest] if context else whole_alone[rest]
            head = heads[context] if context else []
            spans.append(self._span(head, ids[len(head) :], pair))
        cut = sum(span.cut > 0 for span in spans)
        if cut:
            logger.warning(
                "%d of %d contexts lost their beginning: the model reads %d tokens at once",
                *(cut, len(spans), self._max_length),
            )
        return spans

    def _span(self, head: Ids, counted: Ids, pair: tuple[str, str]) -> Span:
        if not head and counted[:1] == [self.prefix]:
            head, counted = counted[:1], counted[1:]
        ids, count = [*(head or [self.prefix]), *counted], len(counted)
        if not 1 <= count <= self._max_length:
            raise ValueError(
                f"continuation {pair[1][:80]!r} has {count} tokens after context "
                f"{pair[0][-80:]!r}; it must have 1 to {self._max_length}, what the model reads "
                "at once"
            )
        cut = max(0, len(ids) - self._max_length - 1)
        return Span(np.asarray(ids[cut:], np.int32), count, cut)

    def windows(self, texts: Sequence[str]) -> list[list[Span]]:
        """The windows over each document, whose first token comes after the prefix."""
        encoded = self.encode(texts)
        return [
            rolling_spans(self.prefix, np.asarray(encoded[text], np.int32), self._max_length)
            for text in texts
        ]

    def prompts(self, texts: Sequence[str], asked: Sequence[SamplingParams]) -> list[Ids]:
        """What is gone on with: the end of each text that leaves room for the answer."""
        encoded = self.encode(texts)
        prompts = []
        for text, params in zip(texts, asked, strict=True):
            room = self._max_length - (params.max_tokens or 0)
            if room < 1:
                raise ValueError(
                    f"generation_kwargs: max_gen_toks is {params.max_tokens}; it must be less than "
                    f"the {self._max_length} tokens that the model reads at once"
                )
            prompts.append(encoded[text][-room:] or [self.prefix])
        return prompts


def _move_space(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
