"""IFEval's instructions: each by hand, and item by item against lm-evaluation-harness where it can run."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from gptsmith.errors import DataError
from gptsmith.tasks.definition import Item
from gptsmith.tasks.ifeval import INSTRUCTIONS, count_capital_words, count_sentences, followed, loose, strict
from gptsmith.tasks.languages import detect_language

CASES: list[
    tuple[str, dict[str, Any], list[str], list[str]]
] = [  # instruction, arguments, followed by, not followed by
    ("keywords:existence", {"keywords": ["cat", "dog"]}, ["Dogs and CATS"], ["only cats"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, ["cat, Cat"], ["cat"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, ["cat"], ["cat cat"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["concatenate"], ["a Cat."]),
    (
        "keywords:letter_frequency",
        {"letter": "q", "let_frequency": 2, "let_relation": "at least"},
        ["Quite quiet"],
        ["quiet"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        ["#one #two"],
        ["#one and many letters of all kinds"],
    ),
    ("language:response_language", {"language": "de"}, ["Das ist ein schöner Tag und ich bin froh."], ["A fine day."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, ["One. Two"], ["One, two."]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["two words"], ["now three words"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "*** one *** two ***"],
        ["one\n\ntwo", "one *** *** two"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "cats"},
        ["Dogs.\n\n'Cats, too."],
        ["Cats.\n\nDogs.", "Dogs.\n\nCats.\n\nBirds."],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] and [address]"], ["[name] [address"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Text\n\nP.S. more", "p. s. x"], ["PS more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S. more"], ["P.S. more"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* one\n- two"],
        ["* one", "* a\n* b\n* c", "**a**"],
    ),
    ("detectable_format:constrained_response", {}, ["My answer is maybe."], ["My answer is perhaps."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two*", "**one** *two*"],
        ["*one* and **"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na\nSection 2"],
    ),
    ("detectable_format:json_format", {}, ['```json\n{"a": [1]}\n```', "[]"], ["{'a': 1}", 'Here: {"a": 1}']),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<A title>", "<<>>", "<<\n>>"]),
    ("combination:two_responses", {}, ["one\n******\ntwo"], ["one", "same ****** same", "a ****** b ****** c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say this. "}, ["say THIS. Then more"], ["Then say this."]),
    ("startend:end_checker", {"end_phrase": "The end."}, ['"So it was. the END."'], ["The end. Or not"]),
    ("startend:quotation", {}, ['"text"\n'], ['"text', '"', "'text'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["I SAID it"],
        ["I said it"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS THE TEXT."],
        ["THIS IS The TEXT.", "DAS IST DER TAG UND ICH BIN FROH."],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["this is the text."],
        ["This is the text.", "das ist der tag und ich bin froh"],
    ),
    ("punctuation:no_comma", {}, ["no such thing"], ["one, two"]),
]


def _record(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"instruction_id_list": [name], "kwargs": [arguments]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
def test_instruction(case: tuple[str, dict[str, Any], list[str], list[str]]) -> None:
    name, arguments, good, bad = case
    for text in good:
        assert followed(text, _record(name, arguments)) == [True], text
    for text in [*bad, "", " \n"]:
        assert followed(text, _record(name, arguments)) == [False], text


def test_all_kinds_are_tried() -> None:
    assert {name for name, *_ in CASES} == set(INSTRUCTIONS)
    assert len(INSTRUCTIONS) == 25


def test_strict_and_loose() -> None:
    record = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    }
    item = Item(0, "", (), (), record)
    assert strict('"no comma"', item) == loose('"no comma"', item) == 1
    text = 'Sure, here it is:\n*"no comma"*'
    assert (strict(text, item), loose(text, item)) == (0, 1)
    assert followed(text, record) == [False, False]
    assert loose('one, two\n"three, four"', item) == 0


def test_wrong_records() -> None:
    with pytest.raises(DataError, match="Did you mean 'punctuation:no_comma'"):
        followed("text", _record("punctuation:no_commas", {}))
    with pytest.raises(DataError, match="wrong arguments"):
        followed("text", _record("keywords:existence", {}))
    with pytest.raises(DataError, match="not 'more than'"):
        followed("text", _record("length_constraints:number_words", {"num_words": 1, "relation": "more than"}))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three? Four", 4),
        ("Dr. Smith met Mr. J. Jones. They talked.", 2),
        ("It is 3.5 m long, e.g. in Berlin.", 1),
        ("He lives in the U.S. The weather is fine.", 2),
        ("Wait... what? Yes.", 2),
        ('"Stop!" he said. "Why?"', 3),
        ("No end", 1),
        ("", 0),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "This is a short text about the weather in London."),
        ("de", "Dies ist ein kurzer Text über das Wetter in Berlin."),
        ("fr", "Ceci est un petit texte sur le temps qu'il fait à Paris."),
        ("es", "Este es un texto corto sobre el clima en la ciudad de Madrid."),
        ("pt", "Este é um texto curto sobre o clima na cidade de Lisboa, que não é muito frio."),
        ("it", "Questo è un breve testo sul tempo che fa nella città di Roma."),
        ("fi", "Tämä on lyhyt teksti säästä ja se ei ole pitkä, mutta se on hyvä."),
        ("sw", "Hii ni makala fupi kuhusu hali ya hewa katika mji wa Nairobi, na ni nzuri sana."),
        ("vi", "Đây là một văn bản ngắn về thời tiết của thành phố Hà Nội và những ngày mưa."),
        ("ru", "Это короткий текст о погоде в Москве, и он не очень длинный."),
        ("bg", "Това е кратък текст за времето в София и не е много дълъг."),
        ("ar", "هذا نص قصير عن الطقس في مدينة القاهرة وهو جميل جدا."),
        ("fa", "این یک متن کوتاه است که به آب و هوا می‌پردازد و در تهران نوشته شده است."),
        ("ur", "یہ موسم کے بارے میں ایک مختصر تحریر ہے اور اس کو کراچی میں لکھا گیا ہے۔"),
        ("hi", "यह दिल्ली के मौसम के बारे में एक छोटा लेख है और यह बहुत अच्छा है।"),
        ("mr", "हा पुण्यातील हवामानाबद्दल एक छोटा लेख आहे आणि तो चांगला आहे."),
        ("ne", "यो काठमाडौंको मौसमको बारेमा एउटा छोटो लेख हो र यो राम्रो छ।"),
        ("ko", "이것은 서울의 날씨에 대한 짧은 글입니다."),
        ("th", "นี่คือข้อความสั้น ๆ เกี่ยวกับสภาพอากาศ"),
        ("kn", "ಇದು ಹವಾಮಾನದ ಬಗ್ಗೆ ಒಂದು ಸಣ್ಣ ಪಠ್ಯ."),
        ("pa", "ਇਹ ਮੌਸਮ ਬਾਰੇ ਇੱਕ ਛੋਟਾ ਲੇਖ ਹੈ।"),
        ("gu", "આ હવામાન વિશે એક ટૂંકો લેખ છે."),
        ("te", "ఇది వాతావరణం గురించి ఒక చిన్న వచనం."),
        ("ta", "இது வானிலை பற்றிய ஒரு சிறிய உரை."),
        ("bn", "এটি আবহাওয়া সম্পর্কে একটি ছোট লেখা।"),
        ("ja", "これは天気についての短い文章です。"),
        ("zh-cn", "这是一篇关于天气的短文。"),
        (None, "123 + 456 = 579!"),
    ],
)
def test_languages(code: str | None, text: str) -> None:
    assert detect_language(text) == code


# Against the published code -------------------------------------------------------------------------------------------


def _answers(record: dict[str, Any], rng: random.Random) -> Iterator[str]:
    """Yield answers to a prompt that follow many of its instructions by chance, and break others."""
    pieces = [
        "The quick brown fox jumps over the lazy dog.",
        "HERE IS A LOUD SENTENCE, AND IT ISN'T SHORT!",
        "Is this the end?",
        "one of the words that we can use for it",
        "* a point of the list",
        "- another point",
        "*highlighted* and **bold**",
        "<<The title>>",
        "[name] and [address]",
        "***",
        "******",
        "P.S. one more",
        "P.P.S. the last",
        "My answer is yes.",
        "SECTION 1",
        "Section 2",
        '{"a": 1}',
        "\n",
        '"',
    ]
    for arguments in record["kwargs"]:
        for value in arguments.values():
            pieces += value if isinstance(value, list) else [str(value)] * 2
    for _ in range(3):
        parts = rng.choices(pieces, k=rng.randint(1, 25))
        text = rng.choice([" ", "\n", "\n\n"]).join(parts)
        if prompt := record["kwargs"][0].get("prompt_to_repeat"):
            text = f"{prompt}\n{text}"
        yield rng.choice([text, text.upper(), text.lower(), f'"{text}"', text.replace(",", "")])


@pytest.mark.network
def test_the_same_as_lm_evaluation_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare all prompts but two with answers made up for them, strictly and loosely.

    Languages and sentences are told by the same means in both, since those differ on purpose.
    """
    import nltk

    # Of the two packages that its module needs besides, nothing that matters here is used.
    stand_ins: dict[str, dict[str, Any]] = {
        "langdetect": {"LangDetectException": type("LangDetectException", (Exception,), {})},
        "immutabledict": {"immutabledict": dict},
    }
    for name, contents in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(nltk, "download", lambda *_, **__: True)
    monkeypatch.setattr(nltk.data, "find", lambda *_, **__: "")
    instructions = pytest.importorskip("lm_eval.tasks.ifeval.instructions")
    utils = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    words = nltk.tokenize.NLTKWordTokenizer()
    monkeypatch.setattr(instructions.instructions_util.nltk, "word_tokenize", words.tokenize)
    monkeypatch.setattr(instructions.instructions_util, "count_sentences", count_sentences)

    def detect(text: str) -> str:
        found = detect_language(text)
        if found is None:
            raise instructions.langdetect.LangDetectException("no letters")
        return found

    monkeypatch.setattr(instructions.langdetect, "detect", detect, raising=False)
    rng = random.Random(0)
    compared = 0
    from gptsmith.tasks.definition import load_definition

    for item in load_definition("ifeval").items():
        if any(arguments.get("letter") in ("#", "!") for arguments in item.record["kwargs"]):
            continue  # theirs counts a random letter
        example = utils.InputExample(
            0, item.record["instruction_id_list"], item.record["prompt"], item.record["kwargs"]
        )
        for text in _answers(item.record, rng):
            theirs = utils.test_instruction_following_strict(example, text).follow_instruction_list
            assert followed(text, item.record) == theirs, (item.record, text)
            theirs = utils.test_instruction_following_loose(example, text).follow_instruction_list
            assert followed(text, item.record, loosely=True) == theirs, (item.record, text)
            compared += 1
    assert compared == 539 * 3


def test_capital_words_as_in_nltk() -> None:
    nltk = pytest.importorskip("nltk")
    rng = random.Random(0)
    pieces = [
        "I",
        "DON'T",
        "don't",
        "WELL-KNOWN",
        "U.S.A",
        "IT'S",
        "John's",
        "A1",
        "OK!",
        "(YES)",
        "NO,",
        '"HI"',
        "3:00",
    ]
    pieces += [
        "CANNOT",
        "WE'LL",
        "X-RAY",
        "A...B",
        "NASA;",
        "[PI]",
        "100%",
        "$5",
        "A/B",
        "e-MAIL",
        "--",
        "THEY'RE",
        "1,000",
    ]
    for _ in range(2000):
        text = " ".join(rng.choices(pieces, k=rng.randint(1, 6)))
        expected = sum(word.isupper() for word in nltk.tokenize.NLTKWordTokenizer().tokenize(text))
        assert count_capital_words(text) == expected, (text, nltk.tokenize.NLTKWordTokenizer().tokenize(text))


def test_sentences_as_in_untrained_punkt() -> None:
    punkt = pytest.importorskip("nltk.tokenize.punkt").PunktSentenceTokenizer()
    rng = random.Random(0)
    pieces = [
        "The cat sat.",
        "Why?",
        "Stop!",
        "a word",
        "and more,",
        '"Go!"',
        "(Really.)",
        "3.5 kg.",
        "The end.\n",
        "* It is.",
    ]
    for _ in range(1000):
        text = " ".join(rng.choices(pieces, k=rng.randint(1, 8)))
        assert count_sentences(text) == len(punkt.tokenize(text)), text
