"""The application: OpenAI's API, and a few endpoints more, over the models of a `Models`.

app = create_app(Models(["runs/bard"], load))          # an ASGI application; `serving.serve` runs it
app.state.models, app.state.service
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptsmith import __version__
from gptsmith.server import api_docs, chat, completions, embeddings, responses
from gptsmith.server.errors import ApiError, from_validation
from gptsmith.server.middleware import Front
from gptsmith.server.models import Models
from gptsmith.server.schema import Error, ModelCard, ModelList
from gptsmith.server.service import Service, Settings, exchange_of, service_of
from gptsmith.server.webapp import add_pages


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The description of the API; bodies that do not fit are answered with 400 here, not with FastAPI's 422."""
        schema = super().openapi()
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        return schema


def create_app(models: Models, settings: Settings | None = None) -> FastAPI:
    """An application that serves `models`. When it is shut down, it closes their engines."""
    settings = settings or Settings()
    service = Service(models, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stop_taking()
        await asyncio.to_thread(models.close)

    app = _Application(
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
    _add_state_of_the_server(app)
    _add_error_handlers(app)
    add_pages(app, models=True, runs=settings.runs, stopping=lambda: service.draining)

    app.add_middleware(Front, service=service)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _add_state_of_the_server(app: FastAPI) -> None:
    @app.get("/v1/models", response_model=ModelList, tags=["OpenAI"])
    async def list_models(request: Request) -> ModelList:
        """The models that may be asked for, with aliases and adapters."""
        return ModelList(data=_cards(service_of(request).models))

    @app.get("/v1/models/{name:path}", response_model=ModelCard, tags=["OpenAI"])
    async def one_model(name: str, request: Request) -> ModelCard:
        for card in _cards(service_of(request).models):
            if card.id == name:
                return card
        raise ApiError(404, f"there is no model {name[:100]!r} here.", param="model", code="model_not_found")

    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """Whether the server is alive."""
        return {"status": "ok"}

    @app.get("/ready", tags=["server"])
    async def ready(request: Request) -> dict[str, str]:
        """Whether it takes requests; 503 once it is shutting down."""
        if service_of(request).draining:
            raise ApiError(503, "the server is shutting down.", retry_after=5)
        return {"status": "ready"}

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _cards(models: Models) -> list[ModelCard]:
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
    def answer(request: Request, error: ApiError) -> JSONResponse:
        exchange_of(request).facts.setdefault("error", error.message)
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        message = f"there is no {request.url.path[:200]} here." if error.status_code == 404 else str(error.detail)
        response = answer(request, ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response
