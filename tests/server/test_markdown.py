"""Untrusted Markdown: the HTML runs no script and loads nothing, and ordinary Markdown still works."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.server.markdown import ATTRIBUTES, TAGS, to_html


class TagCollector(HTMLParser):
    """Collect the tags and attributes that a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def assert_harmless(html: str) -> None:
    seen = TagCollector(html)
    assert seen.tags <= TAGS
    for tag, name, value in seen.attributes:
        assert name in ATTRIBUTES.get(tag, set()) | {"rel"}
        if name == "href":
            assert value.startswith(("http://", "https://", "mailto:"))


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    '<a href="javascript:alert(1)">x</a>',
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\nscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x)",
    "[x](//example.org)",
    "[x](file:///etc/passwd)",
    "![x](https://example.org/who-reads-this.png)",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    '[x](https://e.org "\\" onmouseover=alert(1) x=\\"")',
    "<https://e.org/\"onmouseover='alert(1)'>",
    "<javascript:alert(1)>",
    '```"><script>alert(1)</script>\nx\n```',
    "```js onload=alert(1)\nx\n```",
    "<style>*{display:none}</style>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<form action=https://e.org><input name=password></form>",
    "<math><mtext></p><p><style><!--</style><img src onerror=alert(1)>",
    "<!--><script>alert(1)</script>-->",
    "<div style='position:fixed;inset:0'>x</div>",
    "| a |\n|---|\n| <b onclick=alert(1)>x</b> |",
    "[a]: javascript:alert(1)\n\n[a]",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_attacks_are_escaped(text: str) -> None:
    assert_harmless(to_html(text))


@given(
    st.lists(
        st.sampled_from([*ATTACKS, "*", "_", "`", "[", "]", "(", ")", "<", ">", "\n", "\\", "|", "a", "&lt;", "\x00"])
    )
)
def test_combinations_of_attacks(parts: list[str]) -> None:
    assert_harmless(to_html("".join(parts)))


def test_formatting() -> None:
    html = to_html(
        "# Title\n\n*a* **b** ~~c~~ `d < e`\n\n1. one\n2. two\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n> said\n\n---"
    )
    for part in ("<h1>Title</h1>", "<em>a</em>", "<strong>b</strong>", "<s>c</s>", "<code>d &lt; e</code>", "<ol>"):
        assert part in html
    assert "<td>1</td>" in html
    assert "<blockquote>" in html
    assert "<hr>" in html


def test_code_is_verbatim() -> None:
    assert "<pre><code>if a &lt; b:\n    print(&quot;&amp;amp;&quot;)" in to_html(
        '```python\nif a < b:\n    print("&amp;")\n```'
    ).replace('"', "&quot;")


def test_lone_surrogates() -> None:
    assert to_html("a\ud800b") == "<p>a?b</p>\n"


def test_links() -> None:
    html = to_html('[here](https://example.org "a title") and <mail@example.org>')
    assert '<a href="https://example.org" title="a title" rel="noopener noreferrer nofollow">here</a>' in html
    assert 'href="mailto:mail@example.org"' in html


@pytest.mark.parametrize(
    "text", ["*" * 20_000, "[" * 20_000, ">" * 5_000 + "x", "- " * 3_000, "`" * 20_000, "|" * 20_000]
)
def test_deep_nesting_is_fast(text: str) -> None:
    import time

    began = time.thread_time()
    assert_harmless(to_html(text))
    assert time.thread_time() - began < 5
