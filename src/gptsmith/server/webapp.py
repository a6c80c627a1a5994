"""The web page: static files with strict headers, and the routes that only the page uses.

There is no build step: what is in `web/` is what browsers get. Its files are served under a name that changes with
their contents, so a browser may keep them for ever; `/` itself is asked for each time and names the current ones.
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
from gptsmith.server.runs import runs_routes

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing from elsewhere, nothing inline, no eval; HTML is only made from text by the one policy of that name, which
# web/markdown.js gives what the sanitiser has let through.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
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
    """The files of the page. version: changes with any of them."""

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


def add_pages(
    app: FastAPI,
    *,
    models: bool = False,
    runs: Path | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Serve the page at `/`: chat, playground and inside where the application has models, training runs with `runs`.

    The page's own interface is under `/api/`; what guards `/v1/` should guard it, too. `/` and `/static/` hold nothing
    but the page. stopping: whether the server is shutting down: then news of runs end.
    """
    assets = Assets.read()
    views = (["chat", "playground", "inside"] if models else []) + (["runs"] if runs is not None else [])
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
            raise ApiError(404, f"the page has no file {name[:100]!r}.")
        keep = "public, max-age=31536000, immutable" if version == assets.version else "no-store"
        return Response(content, media_type=TYPES[Path(name).suffix], headers={**HEADERS, "cache-control": keep})

    @app.get("/favicon.ico", include_in_schema=False)
    def favicon() -> Response:
        headers = {**HEADERS, "cache-control": "public, max-age=86400"}
        return Response(assets.files["icon.svg"], media_type=TYPES[".svg"], headers=headers)

    if models:
        from gptsmith.server import inspect, markdown  # which bring torch

        app.include_router(inspect.router)
        app.include_router(markdown.router)
    if runs is not None:
        app.include_router(runs_routes(runs, stopping))


def watch_app(runs: Path, *, hosts: list[str] | None = None, stopping: Callable[[], bool] = lambda: False) -> FastAPI:
    """The page with training runs and nothing else: no model, no torch.

    runs: a directory of runs, or one run. hosts: names by which it may be reached (None: any). A page elsewhere can
    have its own name lead to this machine; it is refused for the name.
    """
    app = FastAPI(title="gptsmith watch", docs_url=None, redoc_url=None, openapi_url=None)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.exception_handler(ApiError)
    def refuse(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    add_pages(app, runs=runs, stopping=stopping)
    return app
