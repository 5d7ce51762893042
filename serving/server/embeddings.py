"""`POST /v1/embeddings`: prompts to vectors."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from starlette.responses import Response

from serving.request import Kind
from serving.server.errors import ApiError, JsonResponse
from serving.server.generation import Usage, collect, new_id, prompt_job
from serving.server.logs import Note
from serving.server.prompts import check_lengths, encode_prompts
from serving.server.schemas import EmbeddingRequest
from serving.server.service import Service


async def embed(service: Service, body: EmbeddingRequest, note: Note) -> Response:
    """Answer a request."""
    service.check_ready()
    adapter = service.check_model(body.model)
    prompts = await encode_prompts(service.tokenizer, body.input, param="input")
    check_lengths(prompts, service.engine.limits.max_model_len)
    note.job = job = prompt_job(service, prompts, Kind.EMBED, new_id("embd"), adapter)
    job.start()
    choices = await collect(job, Usage(job))
    vectors = np.stack([np.asarray(choice.vector, np.float32) for choice in choices])
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


def _written(vector: np.ndarray, body: EmbeddingRequest) -> Any:
    if body.encoding_format == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
