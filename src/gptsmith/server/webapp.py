"""The web page: static files with strict headers, and the routes that only the page uses.

There is no build step: browsers get the files in `web/` as they are. Their URLs contain a hash of their contents, so
browsers can cache them forever; `/` itself is revalidated each time and refers to the current URLs.
"""

from __future__ import annotations

import hashlib
import html
import string
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

import gptsmith
from gptsmith.server.errors import ApiError
from gptsmith.server.head import HeadMiddleware
from gptsmith.server.runs import runs_routes

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing from other hosts, nothing inline but pictures that the person adds, no eval. Only one Trusted Types policy can
# turn text into HTML, and web/markdown.js passes it only what the sanitizer has returned.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types sanitized-markdown",
    )
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True)
class Assets:
    """The files of the page. version: a hash of their contents."""

    files: dict[str, bytes]
    version: str

    @classmethod
    def read(cls) -> Assets:
        found = {
            file.name: file.read_bytes()
            for file in files("gptsmith.server").joinpath("web").iterdir()
            if Path(file.name).suffix in TYPES
        }
        digest = hashlib.sha256()
        for name, content in sorted(found.items()):
            digest.update(name.encode() + b"\0" + content + b"\0")
        return cls(found, digest.hexdigest()[:16])

    def index(self, *, views: str, title: str) -> bytes:
        page = string.Template(self.files["index.html"].decode())
        return page.substitute(
            static=f"static/{self.version}", views=views, title=html.escape(title), version=gptsmith.__version__
        ).encode()


def add_web_app(
    app: FastAPI,
    *,
    models: bool = False,
    collect: Path | None = None,
    reward_model: str | None = None,
    runs: Path | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Serve the page at `/`: chat, playground and inside if the application has models, with compare if there is a file
    to `collect` in; training runs if `runs` is set.

    The page's own API is under `/api/` and needs the same protection as `/v1/`. `/` and `/static/` contain only the
    page. stopping: returns whether the server is shutting down; then event streams of runs end.
    """
    assets = Assets.read()
    shown = {
        "chat": models,
        "compare": models and collect is not None,
        "playground": models,
        "inside": models,
        "runs": runs is not None,
    }
    views = [name for name, is_shown in shown.items() if is_shown]
    index = assets.index(views=" ".join(views), title="gptsmith")
    etag = f'"{hashlib.sha256(index).hexdigest()[:24]}"'

    @app.get("/", include_in_schema=False)
    def page(request: Request) -> Response:
        headers = {**HEADERS, "cache-control": "no-cache", "etag": etag}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(index, media_type=TYPES[".html"], headers=headers)

    @app.get("/static/{version}/{name}", include_in_schema=False)
    def static(version: str, name: str) -> Response:
        content = assets.files.get(name)
        if content is None or name == "index.html":
            raise ApiError(404, f"No such file: {name[:100]!r}.")
        keep = "public, max-age=31536000, immutable" if version == assets.version else "no-store"
        return Response(content, media_type=TYPES[Path(name).suffix], headers={**HEADERS, "cache-control": keep})

    @app.get("/favicon.ico", include_in_schema=False)
    def favicon() -> Response:
        headers = {**HEADERS, "cache-control": "public, max-age=86400"}
        return Response(assets.files["icon.svg"], media_type=TYPES[".svg"], headers=headers)

    if models:
        from gptsmith.server import inspect, markdown  # these import torch

        app.include_router(inspect.router)
        app.include_router(markdown.router)
        if collect is not None:
            from gptsmith.server import comparisons

            app.include_router(comparisons.comparison_routes(collect, reward_model))
    if runs is not None:
        app.include_router(runs_routes(runs, stopping))


def watch_app(runs: Path, *, hosts: list[str] | None = None, stopping: Callable[[], bool] = lambda: False) -> FastAPI:
    """Return an application that shows training runs and has no models. It does not import torch.

    runs: a directory of runs, or one run. hosts: allowed Host headers (None: any), which protect a local server from
    DNS rebinding by web pages elsewhere.
    """
    app = FastAPI(title="gptsmith watch", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(HeadMiddleware)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.exception_handler(ApiError)
    def api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    add_web_app(app, runs=runs, stopping=stopping)
    return app
