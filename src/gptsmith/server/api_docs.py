"""GET /docs: the API reference as one HTML page rendered from /openapi.json, without scripts or external files."""

from __future__ import annotations

import json
from typing import Any

import jinja2
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse

router = APIRouter()

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} API</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8888; padding-top: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #8884; }
nav a { display: inline-block; margin-right: 1rem; }
</style>
</head>
<body>
<h1>{{ title }} {{ version }} API</h1>
<p>Also available as <a href="openapi.json">OpenAPI</a>. If the server has API keys, every request must send one:
<code>Authorization: Bearer KEY</code>.</p>
<nav aria-label="Endpoints">
{% for e in endpoints %}<a href="#{{ e.anchor }}"><code>{{ e.path }}</code></a>
{% endfor %}</nav>
{% for e in endpoints %}
<h2 id="{{ e.anchor }}"><code>{{ e.method }} {{ e.path }}</code></h2>
<p>{{ e.description }}</p>
{% if e.fields %}
<table>
<thead><tr><th scope="col">field</th><th scope="col">type</th><th scope="col">description</th></tr></thead>
<tbody>
{% for f in e.fields %}<tr><td><code>{{ f.name }}</code>{% if f.required %} (required){% endif %}</td>
<td><code>{{ f.type }}</code></td><td>{{ f.description }}</td></tr>
{% endfor %}</tbody>
</table>
{% if e.unsupported %}<p>Not supported; only null is accepted: {% for name in e.unsupported %}<code>{{ name }}</code>
{% endfor %}</p>{% endif %}
{% endif %}
{% endfor %}
</body>
</html>
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@router.get("/docs", include_in_schema=False)
async def api_reference(request: Request) -> HTMLResponse:
    schema = request.app.openapi()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    html = environment.from_string(_PAGE).render(
        title=schema["info"]["title"], version=schema["info"]["version"], endpoints=_endpoints(schema)
    )
    return HTMLResponse(html, headers={"content-security-policy": _POLICY})


def _endpoints(schema: dict[str, Any]) -> list[dict[str, Any]]:
    endpoints = []
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            fields = _fields(schema, body)
            endpoints.append(
                {
                    "path": path,
                    "method": method.upper(),
                    "anchor": operation["operationId"],
                    "description": operation.get("description", ""),
                    "fields": [field for field in fields if field["type"] != "null"],
                    "unsupported": [field["name"] for field in fields if field["type"] == "null"],
                }
            )
    return endpoints


def _fields(schema: dict[str, Any], body: dict[str, Any]) -> list[dict[str, Any]]:
    resolved = _resolve(schema, body)
    required = resolved.get("required", ())
    return [
        {
            "name": name,
            "required": name in required,
            "type": _type(schema, value),
            "description": value.get("description", ""),
        }
        for name, value in resolved.get("properties", {}).items()
    ]


def _resolve(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    name = part.get("$ref", "").rpartition("/")[2]
    return schema["components"]["schemas"][name] if name else part


def _type(schema: dict[str, Any], part: dict[str, Any]) -> str:
    """Return a short description of a JSON schema's type, such as `[integer ≥ 0] | string`."""
    if "$ref" in part:
        return str(part["$ref"].rpartition("/")[2])
    if "anyOf" in part or "oneOf" in part:
        kinds = [_type(schema, option) for option in part.get("anyOf") or part["oneOf"]]
        return " | ".join(kind for kind in dict.fromkeys(kinds) if kind != "null") or "null"
    if "const" in part or "enum" in part:
        return " | ".join(json.dumps(value) for value in part.get("enum", [part.get("const")]))
    kind = str(part.get("type", "any"))
    if kind == "array":
        return f"[{_type(schema, part.get('items', {}))}]"
    bounds = [f"{sign} {part[key]:g}" for key, sign in _BOUNDS if key in part and abs(part[key]) < 2**31 - 1]
    return " ".join([kind, *bounds])


_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
