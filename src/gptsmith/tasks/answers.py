"""The answer in a text, found by rule: in <answer> tags, in \\boxed{…}, after ####, or the last number."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?(?<!\d)\.\d+")


def find_answer(text: str, *, numbers: bool = True) -> str | None:
    """Return the answer in a text: the last of the first of these that it has: <answer> tags, \\boxed{…}, what follows
    #### on its line, and (with `numbers`) a number. None where it has none of them.
    """
    for rule in (tagged_answer, boxed_answer, marked_answer, *([last_number] if numbers else [])):
        if (found := rule(text)) is not None:
            return found
    return None


def tagged_answer(text: str) -> str | None:
    """Return what the last <answer> tags enclose."""
    found = _TAGGED.findall(text)
    return found[-1].strip() if found else None


def boxed_answer(text: str) -> str | None:
    """Return the content of the last \\boxed{…}, whose braces may be nested."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return None


def marked_answer(text: str) -> str | None:
    """Return what follows the last #### on its line, as in GSM8K."""
    _, mark, after = text.rpartition("####")
    return after.strip().split("\n", 1)[0].strip() if mark else None


def last_number(text: str) -> str | None:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return found[-1] if found else None


def same_answer(one: str, other: str) -> bool:
    """Return whether two answers are equal: as numbers, or as texts without regard to case, spaces, $ and a full stop.

    1,000 is 1000, and 0.50 is .5.
    """
    one, other = _plain(one), _plain(other)
    first, second = _number(one), _number(other)
    return one == other if first is None or second is None else first == second


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().strip("$").rstrip(".").strip()).casefold()


def _number(text: str) -> Decimal | None:
    text = text.replace("$", "").replace(" ", "").replace("\N{MINUS SIGN}", "-")
    if not re.fullmatch(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d+)?", text) or not text.strip("+-"):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
