"""Markdown as HTML that is safe to put into a page: what a model writes is a stranger's text.

Two fences, each enough by itself: the parser passes no HTML on (`html` is off: a tag in the text is text), and what it
makes goes through a sanitiser that knows a few tags and fewer attributes. The page's security policy is a third.
"""

from __future__ import annotations

import functools

import nh3
from fastapi import APIRouter
from markdown_it import MarkdownIt
from pydantic import BaseModel, ConfigDict, Field

router = APIRouter(tags=["web page"])
MOST_CHARACTERS = 200_000

TAGS = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "ul", "ol", "li"),
    *("strong", "em", "s", "code", "pre", "a", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}}
# No <img>: a picture's address is a message to whoever owns it.


class MarkdownRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str = Field(max_length=MOST_CHARACTERS)
    """Markdown: CommonMark with tables and ~~strikethrough~~."""


class MarkdownResponse(BaseModel):
    html: str


def to_html(text: str) -> str:
    """The HTML of a Markdown text: only the tags and attributes above, links only to the web and to mail."""
    return nh3.clean(
        _parser().render(text.encode("utf-8", "replace").decode()),  # a lone surrogate cannot be sent
        tags=TAGS,
        attributes=ATTRIBUTES,
        allowed_classes={},
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",
        link_rel="noopener noreferrer nofollow",
    )


@functools.cache
def _parser() -> MarkdownIt:
    # Deep nesting is cut short by the parser (maxNesting); its own guard against quadratic time.
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 50}).enable(["table", "strikethrough"])
    return parser.disable("image")


@router.post("/api/markdown")
def markdown(request: MarkdownRequest) -> MarkdownResponse:
    """Markdown as sanitised HTML."""
    return MarkdownResponse(html=to_html(request.text))
