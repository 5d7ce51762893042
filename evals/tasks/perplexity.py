"""Perplexity and bits per byte of documents, each read by itself: in all, and by domain."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evals.examples import read_examples, read_text
from evals.stats import ratio, transformed
from evals.task import Context, Coroutine, Estimate, Example, Rolling, Row, Task
from evals.taxonomy import Place

OBJECTS = (".jsonl", ".json")


def perplexity(
    path: str,
    text_key: str = "text",
    domain_key: str = "",
    window: int | None = None,
    stride: int | None = None,
    documents: int | None = None,
) -> Task:
    """Documents of JSON lines, or a whole text file.

    text_key: where an object has its text. domain_key: what results are given by, beside the whole.
    window: tokens of context at most. stride: tokens that each later window predicts. documents: at
    most so many.
    """

    def examples() -> Sequence[Example]:
        if not path.removesuffix(".gz").endswith(OBJECTS):
            return [{"id": 0, text_key: read_text(path)}]
        needs = [text_key, domain_key] if domain_key else [text_key]
        return read_examples(path, needs)[:documents]

    def run(example: Example, context: Context) -> Coroutine:
        [found] = yield [Rolling(str(example[text_key]), window, stride)]
        row = {"nats": -found.logprob, "tokens": found.tokens, "bytes": found.bytes}
        return {**row, "words": found.words, "domain": str(example.get(domain_key, ""))}

    return Task(
        name="perplexity",
        version="1",
        licence="of the text",
        place=Place("knowledge and capability", "language modelling", languages=()),
        examples=examples,
        run=run,
        aggregate=aggregate,
    )


def aggregate(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Ratios of sums over documents, which are the items; bits per byte of each domain."""
    found = {
        "bits_per_byte": bits_per_byte(rows),
        "byte_perplexity": transformed(_per(rows, "bytes"), math.exp),
        "word_perplexity": transformed(_per(rows, "words"), math.exp),
        "token_perplexity": transformed(_per(rows, "tokens"), math.exp),
    }
    for domain in sorted({row["domain"] for row in rows} - {""}):
        mine = [row for row in rows if row["domain"] == domain]
        found[f"bits_per_byte/{domain}"] = bits_per_byte(mine)
    return found


def bits_per_byte(rows: Sequence[Row]) -> Estimate:
    """`sum nats / (sum bytes ln 2)`."""
    return transformed(_per(rows, "bytes"), lambda nats: nats / math.log(2), "bits per byte")


def _per(rows: Sequence[Row], unit: str) -> Estimate:
    return ratio(
        [row["nats"] for row in rows], [row[unit] for row in rows], f"nats per {unit[:-1]}"
    )
