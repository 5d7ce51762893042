"""The routes: `create_app` puts an engine behind OpenAI's API and a few of vLLM's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from serving.server import answers
from serving.server.answers import ErrorBody, answered
from serving.server.backend import Engine
from serving.server.chat import chat
from serving.server.completions import complete
from serving.server.embeddings import embed
from serving.server.errors import ApiError, JsonResponse, as_api_error
from serving.server.limits import Gate
from serving.server.logs import log_stats
from serving.server.page import page_routes
from serving.server.prompts import check_ids, encode_messages, encode_text
from serving.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ScoreRequest,
    TokenizeRequest,
)
from serving.server.scores import score
from serving.server.service import Service, version
from serving.server.settings import ServerSettings

STREAM = "text/event-stream"
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """An ASGI app that starts the engine when it is started, and stops it at the end.

    `app.state.service` is its `Service`. Raises `ValueError` for an engine without tokenizer.
    """
    service = Service(engine, settings or ServerSettings())

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None]:
        engine.start()
        service.is_up = True
        stats = asyncio.create_task(log_stats(service))
        try:
            yield
        finally:
            stats.cancel()
            with suppress(asyncio.CancelledError):
                await stats
            await engine.stop()

    app = FastAPI(title="Sheaf", version=version(), lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, service=service)
    if origins := service.settings.allowed_origins:
        allowed: Any = {"allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), **allowed)
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _told)
    apis = (_generation(service), _models(service), _tokens(service), _state(service))
    for router in (*apis, page_routes()):
        app.include_router(router)
    return app


async def _told(request: Request, error: Exception) -> Response:
    told = as_api_error(error)
    assert told is not None
    return told.response()


def _generation(service: Service) -> APIRouter:
    routes = APIRouter(responses=ERRORS)

    @routes.post("/v1/completions", responses=answered(answers.Completion, STREAM))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Texts that continue prompts."""
        return await complete(service, body, request.scope["note"])

    @routes.post("/v1/chat/completions", responses=answered(answers.Chat, STREAM))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers to a conversation."""
        return await chat(service, body, request.scope["note"])

    @routes.post("/v1/embeddings", responses=answered(answers.Embeddings))
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Vectors of texts."""
        return await embed(service, body, request.scope["note"])

    @routes.post("/v1/score", responses=answered(answers.Scores))
    async def scores(body: ScoreRequest, request: Request) -> Response:
        """Log-probabilities of continuations after their contexts."""
        return await score(service, body, request.scope["note"])

    return routes


def _models(service: Service) -> APIRouter:
    routes = APIRouter(responses=ERRORS)

    def model(name: str) -> dict[str, Any]:
        base = service.names[0]
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "sheaf",
            "root": base,
            "parent": base if name in service.engine.adapters else None,
            "max_model_len": service.engine.limits.max_model_len,
        }

    @routes.get("/v1/models", responses=answered(answers.Models))
    async def models() -> Response:
        """The names of the model, and its adapters, whose `parent` it is."""
        names = (*service.names, *service.engine.adapters)
        return JsonResponse({"object": "list", "data": [model(name) for name in names]})

    @routes.get("/v1/models/{name:path}", responses=answered(answers.Model))
    async def one_model(name: str) -> Response:
        """One of them."""
        service.check_model(name)
        return JsonResponse(model(name))

    @routes.get("/version", responses=answered(answers.Version))
    async def get_version() -> Response:
        """Of the server."""
        return JsonResponse({"version": version()})

    return routes


def _tokens(service: Service) -> APIRouter:
    routes = APIRouter(responses=ERRORS)
    engine, tokenizer = service.engine, service.tokenizer

    @routes.post("/tokenize", responses=answered(answers.Tokens))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Ids of a prompt or a chat."""
        service.check_model(body.model)
        if body.messages is not None and body.prompt is None:
            ids = await encode_messages(tokenizer, engine.template, body.messages, body)
        elif body.prompt is not None and body.messages is None:
            given = (body.prompt, body.add_special_tokens, "prompt")
            ids = await asyncio.to_thread(encode_text, tokenizer, *given)
        else:
            message = "the body must have either prompt or messages"
            raise ApiError(400, message, param="prompt")
        longest = engine.limits.max_model_len
        return JsonResponse({"count": len(ids), "max_model_len": longest, "tokens": ids})

    @routes.post("/detokenize", responses=answered(answers.Text))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of ids."""
        service.check_model(body.model)
        ids = check_ids(tokenizer, body.tokens, "tokens")
        return JsonResponse({"prompt": await asyncio.to_thread(tokenizer.decode, ids)})

    @routes.get("/tokenizer_info", responses=answered(answers.TokenizerInfo))
    async def tokenizer_info() -> Response:
        """Special tokens and the chat template, for clients that render chats themselves."""
        roles = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
        told = {name: i if i is None else tokenizer.decode([i]) for name, i in roles.items()}
        templates = {} if engine.template is None else engine.template.templates
        return JsonResponse({**told, "chat_template": templates.get("default")})

    return routes


def _state(service: Service) -> APIRouter:
    routes = APIRouter(responses=ERRORS)

    @routes.get("/health", responses=answered(answers.Status))
    async def health() -> Response:
        """200 while the engine lives."""
        if not service.engine.healthy:
            raise ApiError(503, "the engine has failed; the server's log says why")
        return JsonResponse({"status": "ok"})

    @routes.get("/ready", responses=answered(answers.Status))
    async def ready() -> Response:
        """200 while requests are taken."""
        service.check_ready()
        return JsonResponse({"status": "ready"})

    @routes.post("/reset_prefix_cache", responses=answered(answers.Status))
    async def reset_prefix_cache() -> Response:
        """Forget cached prefixes, if no request runs."""
        service.check_ready()
        try:
            await asyncio.to_thread(service.engine.reset_prefix_cache)
        except ValueError as error:
            raise ApiError(409, str(error), retry_after=1.0) from error
        return JsonResponse({"status": "empty"})

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers in Prometheus' text format."""
        content, media_type = service.metrics.render()
        return Response(content, media_type=media_type)

    return routes
