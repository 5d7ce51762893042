"""`POST /v1/score`: how likely continuations are after their contexts, without generating."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from data.tokenizers import Tokenizer
from serving.outputs import TokenLogprob
from serving.request import Kind
from serving.server.errors import ApiError, JsonResponse
from serving.server.generation import Usage, collect, new_id, prompt_job
from serving.server.logprobs import finite
from serving.server.logs import Note
from serving.server.prompts import check_ids, check_lengths, encode_text
from serving.server.schemas import ScoreRequest
from serving.server.service import Service

Side = str | Sequence[int]


async def score(service: Service, body: ScoreRequest, note: Note) -> Response:
    """Answer a request."""
    service.check_ready()
    adapter = service.check_model(body.model)
    encode = encode_pair
    pairs = [
        await asyncio.to_thread(encode, service.tokenizer, *pair, f"input[{number}]")
        for number, pair in enumerate(body.input)
    ]
    whole = [[*context, *continuation] for context, continuation in pairs]
    check_lengths(whole, service.engine.limits.max_model_len)
    note.job = job = prompt_job(service, whole, Kind.SCORE, new_id("score"), adapter)
    job.start()
    data = []
    for choice in await collect(job, Usage(job)):
        _, continuation = pairs[choice.index]
        entries = (choice.prompt_logprobs or ())[-len(continuation) :]
        data.append({"object": "score", "index": choice.index, **scored(entries)})
    count = sum(map(len, whole))
    usage = {"prompt_tokens": count, "total_tokens": count}
    model = body.model or service.names[0]
    return JsonResponse({"object": "list", "model": model, "data": data, "usage": usage})


def scored(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The log-probability of a continuation, that of each of its tokens, and whether all are the
    likeliest in their places.
    """
    values = [finite(entry.logprob) for entry in entries]
    return {
        "logprob": math.fsum(values),
        "tokens": [entry.token for entry in entries],
        "token_logprobs": values,
        "is_greedy": all(entry.rank == 1 for entry in entries),
    }


def encode_pair(
    tokenizer: Tokenizer, context: Side, continuation: Side, param: str
) -> tuple[list[int], list[int]]:
    """Ids of both sides. Texts are encoded as one, so that a token at the border is what it is in
    the whole; spaces that end the context go to the continuation, where tokenizers have them.
    """
    if isinstance(context, str) and isinstance(continuation, str):
        kept = context.rstrip()
        before = encode_text(tokenizer, kept, True, param) if kept else []
        whole = encode_text(tokenizer, context + continuation, True, param)
        before = before or whole[: len(tokenizer.encode_prompt(""))]
        sides = whole[: len(before)], whole[len(before) :]
    elif isinstance(context, str) or isinstance(continuation, str):
        raise ApiError(
            400, f"{param} mixes text and ids; both must be one or the other", param=param
        )
    else:
        sides = check_ids(tokenizer, context, param), check_ids(tokenizer, continuation, param)
    if not all(sides):
        side = "continuation" if sides[0] else "context"
        raise ApiError(400, f"{param}: the {side} has no tokens; it must have one", param=param)
    return sides
