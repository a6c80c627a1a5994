"""The ASGI application: an OpenAI-compatible API over the models of a `ModelRegistry`, and the web page.

app = create_app(ModelRegistry(["runs/bard"], load))    # run it with `runner.serve`, or with any ASGI server
app.state.models, app.state.service
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptsmith import __version__
from gptsmith.server import api_docs, chat, completions, embeddings, responses
from gptsmith.server.errors import ApiError, from_validation
from gptsmith.server.head import HeadMiddleware
from gptsmith.server.middleware import RequestMiddleware
from gptsmith.server.models import ModelRegistry
from gptsmith.server.schema import Error, ModelCard, ModelList
from gptsmith.server.service import Service, Settings, context_of, service_of
from gptsmith.server.webapp import add_web_app

ROUTERS: list[APIRouter] = []


def register_router(router: APIRouter) -> None:
    """Have every application made from now on serve the router's endpoints, after those of this package.

    They need an API key if the server has any. `service_of(request)` gives them the models; see `Service`.
    """
    if router not in ROUTERS:
        ROUTERS.append(router)


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI schema without FastAPI's 422 responses: here an invalid body is answered with 400."""
        schema = super().openapi()
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        return schema


def create_app(models: ModelRegistry, settings: Settings | None = None) -> FastAPI:
    """Return an application that serves `models`. It closes their engines on shutdown."""
    settings = settings or Settings()
    service = Service(models, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.start_draining()
        await asyncio.to_thread(models.close)

    app = _App(
        title="gptsmith",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={code: {"model": Error} for code in (400, 401, 404, 408, 413, 429, 503, 504)},
    )
    app.state.models, app.state.service = models, service
    for endpoints in (completions, chat, responses, embeddings, api_docs):
        app.include_router(endpoints.router)
    _add_status_routes(app)
    for router in ROUTERS:
        app.include_router(router)
    _add_error_handlers(app)
    add_web_app(
        app,
        models=True,
        collect=settings.collect,
        reward_model=settings.reward_model,
        runs=settings.runs,
        stopping=lambda: service.draining,
    )

    app.add_middleware(HeadMiddleware)
    app.add_middleware(RequestMiddleware, service=service)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _add_status_routes(app: FastAPI) -> None:
    @app.get("/v1/models", response_model=ModelList, tags=["OpenAI"])
    async def list_models(request: Request) -> ModelList:
        """List the available models, including adapters and aliases."""
        return ModelList(data=_cards(service_of(request).models))

    @app.get("/v1/models/{name:path}", response_model=ModelCard, tags=["OpenAI"])
    async def retrieve_model(name: str, request: Request) -> ModelCard:
        """Describe one model."""
        for card in _cards(service_of(request).models):
            if card.id == name:
                return card
        raise ApiError(404, f"The model {name[:100]!r} does not exist.", param="model", code="model_not_found")

    @app.get("/health", tags=["server"])
    async def health(request: Request, response: Response) -> dict[str, str]:
        """Report that the server is running: 200, or 503 with the status "loading" until the first model is loaded."""
        if service_of(request).loading:
            response.status_code, response.headers["retry-after"] = 503, "5"
            return {"status": "loading"}
        return {"status": "ok"}

    @app.get("/ready", tags=["server"])
    async def ready(request: Request) -> dict[str, str]:
        """Report whether the server accepts requests: 200, or 503 while it is loading or shutting down."""
        if service_of(request).draining:
            raise ApiError(503, "The server is shutting down.", retry_after=5)
        if service_of(request).loading:
            raise ApiError(503, "The model is loading.", retry_after=5)
        return {"status": "ready"}

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def metrics(request: Request) -> Response:
        """Return metrics in the Prometheus text format."""
        return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _cards(models: ModelRegistry) -> list[ModelCard]:
    return [
        ModelCard(
            id=name,
            created=created,
            loaded=loaded is not None,
            max_model_len=None if loaded is None else loaded.context,
            parent=parent,
        )
        for name, created, loaded, parent in models.cards()
    ]


def _add_error_handlers(app: FastAPI) -> None:
    def respond(request: Request, error: ApiError) -> JSONResponse:
        context_of(request).log_error(error)
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(request, from_validation(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"No such endpoint: {request.url.path[:200]}." if error.status_code == 404 else f"{error.detail}."
        response = respond(request, ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response
