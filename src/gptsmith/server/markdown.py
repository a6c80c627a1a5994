"""Convert a model's Markdown, which is untrusted, to HTML that is safe to insert into a page.

There are two independent defenses: the parser escapes HTML in the text (`html` is off), and its output goes through a
sanitizer that allows a few tags and attributes. The page's content security policy is a third.
"""

from __future__ import annotations

import functools

import nh3
from fastapi import APIRouter
from markdown_it import MarkdownIt
from pydantic import BaseModel, ConfigDict, Field

router = APIRouter(tags=["web page"])
MAX_CHARACTERS = 200_000

TAGS = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "ul", "ol", "li"),
    *("strong", "em", "s", "code", "pre", "a", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}}
# No <img>: loading a remote image would leak data to its host.


class MarkdownRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str = Field(max_length=MAX_CHARACTERS)
    """CommonMark with tables and ~~strikethrough~~."""


class MarkdownResponse(BaseModel):
    html: str


def to_html(text: str) -> str:
    """Return Markdown as HTML that contains only the tags and attributes above and only http(s) and mailto links."""
    return nh3.clean(
        _parser().render(
            text.encode("utf-8", "replace").decode()
        ),  # replace lone surrogates, which UTF-8 cannot encode
        tags=TAGS,
        attributes=ATTRIBUTES,
        allowed_classes={},
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",
        link_rel="noopener noreferrer nofollow",
    )


@functools.cache
def _parser() -> MarkdownIt:
    # maxNesting cuts deep nesting short, which would take quadratic time
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 50}).enable(["table", "strikethrough"])
    return parser.disable("image")


@router.post("/api/markdown")
def markdown(request: MarkdownRequest) -> MarkdownResponse:
    """Convert Markdown to sanitized HTML."""
    return MarkdownResponse(html=to_html(request.text))
