"""The language of a text, told by its script and its most frequent words. For IFEval's instructions about languages."""

from __future__ import annotations

import re
from collections import Counter

# The first and last character of scripts, and the language if only one of those below is written in it.
_SCRIPTS = {
    "latin": ("A", "\u024f"),
    "greek": ("\u0370", "\u03ff"),
    "cyrillic": ("\u0400", "\u04ff"),
    "hebrew": ("\u0590", "\u05ff"),
    "arabic": ("\u0600", "\u06ff"),
    "devanagari": ("\u0900", "\u097f"),
    "bengali": ("\u0980", "\u09ff"),
    "gurmukhi": ("\u0a00", "\u0a7f"),
    "gujarati": ("\u0a80", "\u0aff"),
    "tamil": ("\u0b80", "\u0bff"),
    "telugu": ("\u0c00", "\u0c7f"),
    "kannada": ("\u0c80", "\u0cff"),
    "malayalam": ("\u0d00", "\u0d7f"),
    "thai": ("\u0e00", "\u0e7f"),
    "vietnamese": ("\u1ea0", "\u1ef9"),
    "kana": ("\u3040", "\u30ff"),
    "han": ("\u4e00", "\u9fff"),
    "hangul": ("\uac00", "\ud7a3"),
}
_ONE_LANGUAGE = {
    "greek": "el",
    "hebrew": "he",
    "bengali": "bn",
    "gurmukhi": "pa",
    "gujarati": "gu",
    "tamil": "ta",
    "telugu": "te",
    "kannada": "kn",
    "malayalam": "ml",
    "thai": "th",
    "kana": "ja",
    "han": "zh-cn",
    "hangul": "ko",
}
_WORDS = {
    "latin": {
        "en": "the of and to in is that it for as was with be by on not he his are this you i my your "
        "have from at or we they an will can",
        "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es "
        "an werden aus er hat dass sie nach wird bei ich wir sind über mein auf wie",
        "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il "
        "sont avec je vous nous mon cette être c'est",
        "es": "de la que el en y los del se las por un para con no una su al lo como más o pero sus le ha "
        "me si sin sobre este es son está mi muy",
        "pt": "de a o que e do da em um para com não uma os no se na por mais as dos como mas ao ele das "
        "à seu sua ou é são você está eu foi muito",
        "it": "di e il la che in un a per è una sono con non del si da i le dei nel alla della più come "
        "ha lo gli anche ma questo mio essere io",
        "nl": "de van een het en in is dat op te zijn met voor niet aan er om ook als bij maar die of "
        "wordt door naar ik je heeft deze",
        "sv": "och i att det som en på är av för med till den har inte om ett han men var jag sig från vi så kan när",
        "da": "og i at det er en til af på den for med de der som har ikke et han var jeg sig fra vi kan om",
        "no": "og i det er på til en av for at med som den har de ikke et han var jeg seg fra vi kan om",
        "fi": "ja on ei että se oli hän ovat mutta ne kun niin myös joka kuin tai jos olla minä sen hänen "
        "mitä ole voi tämä sekä minun kanssa",
        "pl": "i w na z do się nie to że jest o jak za od po ale dla są tym przez przy czy być jego tylko "
        "może który ich",
        "cs": "a se v na je že s z do o i to k ve pro za by ale si po jako jeho jsou které nebo byl není však",
        "tr": "ve bir bu da de için ile çok olarak daha gibi en olan kadar ne sonra ama var o ben değil olduğu her",
        "ro": "și de în a la cu pe nu că este o un din mai care pentru sunt au fost ce sau se prin al ale",
        "hu": "a az és hogy nem is egy ez van meg csak de mint volt már vagy el én ha azt kell nagyon",
        "id": "yang dan di itu dengan untuk dari dalam tidak ini pada adalah ke saya akan karena oleh ada "
        "juga atau bisa",
        "sw": "ya na wa kwa ni katika la za kuwa hii kama cha hiyo lakini yake wakati sana watu hili au "
        "yangu kila mimi huu pia wake kutoka zaidi bila ndani vya",
        "tl": "ang ng sa na mga ay at ko mo ako hindi para siya ito kung niya may kanyang po isang",
        "vi": "là và của có không được cho một các trong người với này những để đã từ khi về như tôi bạn sẽ rất",
        "et": "ja on ei et see oli ta ka kui aga ning mis või oma seda nii ma siis olid kes",
    },
    "cyrillic": {
        "ru": "и в не на что с он как это по но из у за то все так от о был же для бы мы вы ты или я его "
        "ее если когда ы который только может чтобы",
        "bg": "и на да се в е от за не с си по че като са до но или това който ще са има бъде един са той "
        "ние към също може много съм",
        "uk": "і в не на що з та як це у до за він але від про вони або для його є бути я ми ви якщо також",
        "mk": "и на да се во е од за не со си дека како ќе по но или ова кој има биде тој ние исто",
        "sr": "и у да је на се не за са од су као што али или ово који ће био он ми",
    },
    "arabic": {
        "ar": "في من على أن إلى هذا هذه التي الذي عن مع لا ما كان هو هي أو كل بعد قد ذلك كما لم و يمكن أنا",
        "fa": "و در به از که این را با است برای آن یک می خود تا بر هم نیز شده ها بود یا اما های من شما",
        "ur": "کے کی میں ہے کا اور سے کو پر نے کہ یہ ہیں اس بھی ایک تھا لیے نہیں کر ہو وہ جو آپ",
    },
    "devanagari": {
        "hi": "है के की में का और से को हैं पर यह एक भी नहीं कि ने इस जो कर हो था ही लिए तो मैं अपने आप साथ हम गया",
        "mr": "आहे आणि या व मध्ये की ते हा ही आहेत एक तर हे होते नाही त्या किंवा मी आपण करू साठी पण होता च्या तुम्ही केले",
        "ne": "छ र को मा हो यो छन् पनि भने गर्न लागि एक त्यो थियो तथा वा गरेको हुन्छ म हामी तपाईं छैन गर्ने भएको",
    },
}
_FREQUENT = {
    script: {language: frozenset(words.split()) for language, words in each.items()} for script, each in _WORDS.items()
}


def detect_language(text: str) -> str | None:
    """Return the language of a text: an ISO 639-1 code ("zh-cn" for Chinese). None for a text without letters.

    The script with the most letters decides, and among the languages of a script the one whose frequent words are the
    most. Letters of other scripts and words of other languages do not matter if they are fewer.
    """
    letters = Counter(script for each in text if each.isalpha() for script in [_script(each)] if script)
    if not letters:
        return None
    if letters["vietnamese"] and letters["latin"]:
        letters["latin"] += letters.pop("vietnamese")
    if letters["kana"] and letters["han"]:
        letters["kana"] += letters.pop("han")
    script = max(letters, key=lambda each: letters[each])
    if script in _ONE_LANGUAGE:
        return _ONE_LANGUAGE[script]
    # Vowel signs are not letters to Python, so words are what is between spaces and punctuation.
    words = Counter(re.findall(r"[^\s\d.,;:!?()\[\]{}\"“”«»*_#।،؟؛—–/\\-]+", text.lower()))
    languages = _FREQUENT["latin" if script == "vietnamese" else script]
    scores = {language: sum(words[word] for word in frequent) for language, frequent in languages.items()}
    return max(scores, key=lambda language: scores[language])  # the first of equals: English


def _script(letter: str) -> str | None:
    found = [script for script, (first, last) in _SCRIPTS.items() if first <= letter <= last]
    return found[-1] if found else None
