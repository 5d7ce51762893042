"""`POST /v1/embeddings`: prompts to vectors, for engines that have them."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.responses import Response

from serving.server.errors import ApiError, JsonResponse
from serving.server.prompts import encode_prompts
from serving.server.schemas import EmbeddingRequest
from serving.server.service import Service


async def embed(service: Service, body: EmbeddingRequest) -> Response:
    """Answer a request."""
    service.check_ready()
    adapter = service.check_model(body.model)
    engine = service.engine
    prompts = await encode_prompts(service.tokenizer, body.input, param="input")
    _check_lengths(prompts, engine.limits.max_model_len)
    try:
        found = await asyncio.to_thread(engine.embed, prompts, adapter=adapter)
        vectors = np.asarray(found, np.float32)
    except NotImplementedError as error:
        raise ApiError(501, "this engine has no embeddings") from error
    vectors = shortened(vectors, body.dimensions)
    count = sum(map(len, prompts))
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    model = body.model or service.names[0]
    return JsonResponse({"object": "list", "model": model, "data": data, "usage": usage})


def shortened(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first so many numbers of each vector, of length 1 again."""
    if dimensions is None:
        return vectors
    if dimensions > vectors.shape[1]:
        message = f"dimensions is {dimensions}; it must be at most {vectors.shape[1]}"
        raise ApiError(400, message, param="dimensions")
    kept = vectors[:, :dimensions]
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    return kept / np.maximum(norms, np.finfo(np.float32).tiny)


def _check_lengths(prompts: list[list[int]], longest: int) -> None:
    if (length := max(map(len, prompts))) > longest:
        message = f"input has a text of {length} tokens; it must have at most {longest}"
        raise ApiError(400, message, param="input", code="context_length_exceeded")


def _written(vector: np.ndarray, body: EmbeddingRequest) -> Any:
    if body.encoding_format == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
