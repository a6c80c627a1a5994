"""The instructions of IFEval and whether an answer follows them (Zhou et al. 2023, arXiv 2311.07911).

Each of the 25 kinds of instructions is a function of the answer. The rules are the published ones, except for three
things. Sentences are counted by punctuation and abbreviations, not by NLTK's trained Punkt. Languages are told by
script and frequent words, not by langdetect, whose answers are random for short texts. Characters that are not letters,
such as the # of two prompts, are counted; the published code counts a letter drawn at random instead.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from gptsmith.errors import DataError, nearest
from gptsmith.tasks.definition import Item
from gptsmith.tasks.languages import detect_language


def strict(text: str, item: Item) -> float:
    """Return 1.0 if an answer follows all instructions of its prompt (the prompt-level strict accuracy)."""
    return float(all(followed(text, item.record)))


def loose(text: str, item: Item) -> float:
    """Return 1.0 if an answer follows all instructions when markup and its first or last line may be left out."""
    return float(all(followed(text, item.record, loosely=True)))


def followed(text: str, record: Mapping[str, Any], *, loosely: bool = False) -> list[bool]:
    """Return which instructions an answer follows.

    record: with `instruction_id_list` and `kwargs`, one each. loosely: try the answer also without asterisks, without
    its first line and without its last line; each instruction may be followed by another of these.
    Raises DataError for an unknown instruction, or one without what it needs to know.
    """
    texts = _variants(text) if loosely else [text]
    return [
        any(variant.strip() and _follows(variant, name, arguments) for variant in texts)
        for name, arguments in zip(record["instruction_id_list"], record["kwargs"], strict=True)
    ]


def _variants(text: str) -> list[str]:
    lines = text.split("\n")
    parts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*parts, *(part.replace("*", "") for part in parts)]


def _follows(text: str, name: str, arguments: Mapping[str, Any]) -> bool:
    if name not in INSTRUCTIONS:
        raise DataError(f"there is no instruction {name!r}.{nearest(name, INSTRUCTIONS)}")
    function = INSTRUCTIONS[name]
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        inspect.signature(function).bind(text, **given)
    except TypeError as error:
        raise DataError(f"the instruction {name} has the wrong arguments {given}: {error}.") from None
    return bool(function(text, **given))


def _compare(number: int, relation: str, limit: int) -> bool:
    if relation not in ("less than", "at least"):
        raise DataError(f"an instruction compares by 'less than' or 'at least', not {relation!r}.")
    return number < limit if relation == "less than" else number >= limit


# Keywords and language ------------------------------------------------------------------------------------------------


def _existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


def _forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _response_language(text: str, language: str) -> bool:
    return detect_language(text) in (language, None)


# Length ---------------------------------------------------------------------------------------------------------------


def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(count_sentences(text), relation, num_sentences)


def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by ***. Empty ones may be at the ends only, and do not count."""
    first, *others = re.split(r"\s?\*\*\*\s?", text)
    inner, last = others[:-1], others[-1:]
    if not all(part.strip() for part in inner):
        return False
    return len(inner) + sum(bool(part.strip()) for part in (first, *last)) == num_paragraphs


def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by empty lines. Empty ones do not count, but they have numbers."""
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > count or not (words := paragraphs[nth_paragraph - 1].split()):
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0]
    return count == num_paragraphs and word.lower() == first_word.lower()


# Content and form -----------------------------------------------------------------------------------------------------


def _number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(postscript_marker, postscript_marker.lower())
    return re.search(marker, text.lower()) is not None


def _number_bullet_lists(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _constrained_response(text: str) -> bool:
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


def _number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """Both *one* and **two** asterisks highlight, as long as there is something between them."""
    single = [found for found in re.findall(r"\*[^\n\*]*\*", text) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*[^\n\*]*\*\*", text) if found[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{section_spliter}\s?\d+\s?", text)) >= num_sections


def _json_format(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str) -> bool:
    """Two different answers, separated by ******. Empty parts may be at the ends only."""
    parts = [part.strip() for part in text.split("******")]
    full = [part for part in parts if part]
    return all(parts[1:-1]) and len(full) == 2 and full[0] != full[1]


def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _no_comma(text: str) -> bool:
    return "," not in text


# Case -----------------------------------------------------------------------------------------------------------------


def _english_capital(text: str) -> bool:
    return text.isupper() and detect_language(text) == "en"


def _english_lowercase(text: str) -> bool:
    return text.islower() and detect_language(text) == "en"


def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(count_capital_words(text), capital_relation, capital_frequency)


_CLITICS = re.compile(r"(?<=[^\W\d_'])(N'T|'(?:S|M|D|LL|RE|VE))(?![\w'])")
_TWO_WORDS = re.compile(r"\b(CAN)(NOT)\b|\b(GIM)(ME)\b|\b(GON)(NA)\b|\b(GOT)(TA)\b|\b(LEM)(ME)\b|\b(WAN)(NA)(?=\s)")


def count_capital_words(text: str) -> int:
    """Return the number of words in capital letters, split as NLTK splits them: DON'T is two words, WELL-KNOWN one."""
    text = re.sub(r"([\[\](){}<>\"“”«»„‘;@#$%&?!…`]|--|[:,](?=\D|$)|\.\.+)", r" \1 ", text)
    text = _TWO_WORDS.sub(lambda found: " ".join(filter(None, found.groups())), _CLITICS.sub(r" \1 ", text))
    return sum(word.isupper() for word in text.split())


# Sentences ------------------------------------------------------------------------------------------------------------


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ABBREVIATIONS = _set(
    "mr mrs ms dr prof st jr sr inc ltd co corp vs etc e.g i.e u.s u.k u.n u.s.a a.m p.m d.c ph.d no vol fig "
    "jan feb mar apr jun jul aug sep sept oct nov dec gen rep sen gov lt col sgt capt rev hon ave blvd dept approx cf"
)
_STARTERS = _set("the he she it they we this that these those there but however in if when a an i you")
_END = re.compile(r"(\S*[^\s.?!]|)([.?!]+)[\"'”’)\]}*_]*(?=\s+(\S+))")


def count_sentences(text: str) -> int:
    """Return the number of sentences: parts that end with . ? or !, and what is left after the last of them.

    A full stop after an abbreviation or an initial does not end a sentence unless a word follows that begins one, nor
    do dots before a small letter.
    """
    ends = sum(_ends_sentence(*found.groups()) for found in _END.finditer(text))
    return ends + 1 if text.strip() else 0


def _ends_sentence(word: str, marks: str, following: str) -> bool:
    if marks[-1] != ".":
        return True
    first = following.lstrip("\"'“‘([{*_")
    if len(marks) > 1:
        return not first[:1].islower()
    plain = word.lower().lstrip("\"'“‘([{*_")
    if plain in _ABBREVIATIONS or re.fullmatch(r"[^\W\d_]", plain):  # or an initial: J. Smith
        return first[:1].isupper() and first.lower().rstrip(",") in _STARTERS
    return True


INSTRUCTIONS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
"""The kinds of instructions: functions `(answer, **arguments) -> whether it is followed`."""
