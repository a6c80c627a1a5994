"""Loss on texts: against transformers' recipe, against the definitions, and independent of how the work is divided."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptsmith.data import sources
from gptsmith.errors import DataError, GptsmithError, TokenizerError, UsageError
from gptsmith.evaluate import text as measured
from gptsmith.evaluate.text import TextOptions, TextResult, evaluate_text, evaluate_texts, induction
from gptsmith.loading import load_model
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer, train_char
from tests.factories import tiny_model
from tests.foreign import TEXT, byte_level, sentencepiece, unigram, word_ends, write_model

CONTEXT = 24
CHARACTERS = train_char(["abcdefghij \n"])


def recipe(model: Any, ids: list[int], context: int, stride: int) -> float:
    """Perplexity as transformers documents it for models of fixed length, over all tokens that have a loss."""
    total, count, before = 0.0, 0, 0
    row = torch.tensor([ids])
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        inputs = row[:, begin:end]
        targets = inputs.clone()
        targets[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=targets).loss
        tokens = int((targets[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * tokens, count + tokens, end
        if end == len(ids):
            break
    return math.exp(total / count)


@pytest.fixture(scope="module", params=["byte-level", "beginning-of-sequence", "unigram"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of transformers and its directory, with one of three kinds of tokenizers."""
    path = tmp_path_factory.mktemp("model") / "it"
    if request.param == "byte-level":
        model = write_model(path, "gpt2", byte_level(), {"eos_token": "<|endoftext|>"}, n_positions=CONTEXT)
    elif request.param == "unigram":
        special = {"eos_token": "</s>", "unk_token": "<unk>"}
        model = write_model(path, "qwen2", unigram(), special, max_position_embeddings=CONTEXT)
    else:
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        model = write_model(
            path, "llama", sentencepiece(), special, bos_token_id=1, eos_token_id=2, max_position_embeddings=CONTEXT
        )
    return model, path


@pytest.mark.parametrize("stride", [1, 5, 12, 24])
def test_perplexity_is_that_of_the_documented_recipe(foreign: tuple[Any, Path], stride: int, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    model, path = foreign
    (file := tmp_path / "text.txt").write_text(TEXT[:700], encoding="utf-8")
    ids = PreTrainedTokenizerFast.from_pretrained(path)(TEXT[:700])["input_ids"]
    ours, tokenizer = load_model(path)
    assert ids == tokenizer.encode_prompt(TEXT[:700])
    found = evaluate_text(ours, tokenizer, file, options=TextOptions(stride=stride))
    assert found.perplexity == pytest.approx(recipe(model, ids, CONTEXT, stride), rel=1e-4)
    assert found.stride == stride
    scored = len(ids) - len(range(0, len(ids), stride)) if stride == CONTEXT else len(ids) - 1
    assert found.scored_tokens == scored


@torch.no_grad()
def script(model: Any, ids: list[int], max_length: int, stride: int) -> float:
    """Perplexity as the script in transformers' documentation computes it, including how it counts tokens."""
    row, nats, tokens, previous = torch.tensor([ids]), 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        labels = row[:, begin:end].clone()
        labels[:, : previous - end] = -100
        counted = int((labels != -100).sum()) - 1
        nats, tokens, previous = (
            nats + float(model(row[:, begin:end], labels=labels).loss) * counted,
            tokens + counted,
            end,
        )
        if end == len(ids):
            break
    return math.exp(nats / tokens)


@pytest.mark.parametrize("stride", [5, 12, 23, 24])
def test_the_number_of_the_script_in_the_documentation(foreign: tuple[Any, Path], stride: int, tmp_path: Path) -> None:
    """Without overlap it is the perplexity itself."""
    model, path = foreign
    (file := tmp_path / "text.txt").write_text(TEXT[:700], encoding="utf-8")
    ours, tokenizer = load_model(path)
    expected = script(model, tokenizer.encode_prompt(TEXT[:700]), CONTEXT, stride)
    found = evaluate_text(ours, tokenizer, file, options=TextOptions(stride=stride))
    assert found.script_perplexity == pytest.approx(expected, rel=1e-4)
    if stride == CONTEXT:
        assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert found.to_json()["script_perplexity"] == found.script_perplexity


@torch.no_grad()
def losses(model: Transformer, ids: list[int]) -> list[float]:
    """The loss of each token but the first, in one window."""
    row = torch.tensor([ids])
    found: list[float] = (-torch.log_softmax(model(row[:, :-1])[0], -1).gather(1, row[0, 1:, None])[:, 0]).tolist()
    return found


def rows_file(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefghij \n"), int(rng.integers(1, 60)))) for _ in range(count)]


@pytest.fixture
def model() -> Transformer:
    return tiny_model(vocab_size=CHARACTERS.vocab_size, max_position_embeddings=CONTEXT)


def test_documents_are_scored_apart(model: Transformer, tmp_path: Path) -> None:
    """Each document follows the separator, and those that are longer than the context are strided."""
    texts = ["ab cd", "h", "abcdefghij" * 4, "j\n" * 12, "a b"]
    found = evaluate_text(
        model, CHARACTERS, rows_file(tmp_path / "rows.jsonl", texts), per_document=True, options=TextOptions(stride=10)
    )
    assert CHARACTERS.eos_id is not None
    assert found.start == ("<|endoftext|>",)
    expected = []
    for text in texts:
        ids = [CHARACTERS.eos_id, *CHARACTERS.encode(text)]
        each = losses(model, ids[:CONTEXT])
        for begin in range(10, len(ids), 10):
            if begin + CONTEXT - 10 < len(ids):
                each += losses(model, ids[begin : begin + CONTEXT])[CONTEXT - 10 - 1 :]
        assert len(each) == len(text)
        expected.append(sum(each) / len(each))
    assert [one.loss for one in found.per_document] == pytest.approx(expected, rel=1e-5)
    assert [one.bytes for one in found.per_document] == [len(text) for text in texts]
    assert [one.where.rpartition("line ")[2] for one in found.per_document] == ["1", "2", "3", "4", "5"]
    size = sum(map(len, texts))
    total = sum(loss * len(text) for loss, text in zip(expected, texts, strict=True))
    assert found.loss == pytest.approx(total / size, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert (found.documents, found.tokens, found.scored_tokens, found.bytes) == (5, size, size, size)


def test_joined_documents_are_one_text_with_separators_that_are_not_scored(model: Transformer, tmp_path: Path) -> None:
    texts = ["ab cd", "h", "abcdefghij", "a b"]
    found = evaluate_text(model, CHARACTERS, rows_file(tmp_path / "rows.jsonl", texts), options=TextOptions(join=True))
    assert CHARACTERS.eos_id is not None
    ids = [id for text in texts for id in [*CHARACTERS.encode(text), CHARACTERS.eos_id]]
    assert len(ids) <= CONTEXT
    each = [loss for loss, id in zip(losses(model, ids), ids[1:], strict=True) if id != CHARACTERS.eos_id]
    assert found.loss == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert found.scored_tokens == found.tokens - 1 == sum(map(len, texts)) - 1


def test_a_prefix_before_each_window(tmp_path: Path) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_model(tmp_path / "it", "llama", sentencepiece(), special, max_position_embeddings=CONTEXT)
    model, tokenizer = load_model(tmp_path / "it")
    (file := tmp_path / "text.txt").write_text(TEXT[:300], encoding="utf-8")
    ids = tokenizer.encode(TEXT[:300])
    found = evaluate_text(model, tokenizer, file, options=TextOptions(prefix="every", stride=CONTEXT - 1))
    each = [
        x for start in range(0, len(ids), CONTEXT - 1) for x in losses(model, [1, *ids[start : start + CONTEXT - 1]])
    ]
    assert found.loss == pytest.approx(sum(each) / len(ids), rel=1e-5)
    assert found.scored_tokens == len(each) == len(ids)
    with pytest.raises(UsageError, match="--stride must be between 1 and the context of 24 tokens without the 1"):
        evaluate_text(model, tokenizer, file, options=TextOptions(prefix="every", stride=CONTEXT))


def values(result: TextResult) -> dict[str, Any]:
    found = result.to_json()
    return {name: found[name] for name in ("loss", "bits_per_byte", "tokens", "scored_tokens", "bytes")}


@pytest.mark.parametrize("make", [byte_level, sentencepiece, unigram, word_ends, None])
def test_how_the_work_is_divided_changes_nothing(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces in which a file is read, and the windows that share a forward pass."""
    if make is None:
        model, tokenizer = tiny_model(vocab_size=80, max_position_embeddings=CONTEXT), train_char([TEXT])
    else:
        write_model(tmp_path / "it", "qwen2", make(), {}, max_position_embeddings=CONTEXT)
        model, tokenizer = load_model(tmp_path / "it")
    (file := tmp_path / "text.txt").write_text(TEXT * 2, encoding="utf-8")
    whole = evaluate_text(model, tokenizer, file)
    assert whole.bytes == 2 * len(TEXT.encode())
    assert whole.bits_per_byte == pytest.approx(whole.loss * whole.tokens / whole.bytes / math.log(2))
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(measured, "WINDOWS_AT_ONCE", 3)
    monkeypatch.setattr(measured.window_losses, "__kwdefaults__", {"tokens_at_once": 30})
    divided = evaluate_text(model, tokenizer, file)
    assert values(divided) == pytest.approx(values(whole), rel=1e-5)
    assert divided.parts.bytes.tolist() == whole.parts.bytes.tolist()
    if make is not word_ends:  # it loses spaces, so where its tokens begin is known only roughly
        assert divided.parts.nats == pytest.approx(whole.parts.nats, rel=1e-4)


def test_memory_is_bounded(model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is read as it is scored, and the parts for intervals do not grow with it."""
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 200)
    monkeypatch.setattr(measured, "MAX_PARTS", 8)
    monkeypatch.setattr(measured, "WINDOWS_AT_ONCE", 4)
    text = "".join(make_texts(400))
    (file := tmp_path / "text.txt").write_text(text)
    read = scored = ahead = 0
    chunks = sources.TextSource.chunks

    def counted(self: Any, advance: Any = None) -> Iterator[Any]:
        nonlocal read, ahead
        for chunk in chunks(self, advance):
            ahead = max(ahead, read - scored)
            read += len(chunk.text)
            yield chunk

    def add(self: Any, window: Any, found: Any) -> None:
        nonlocal scored
        scored += int(window.scored.sum())
        original(self, window, found)

    original = measured._Measurement._add
    monkeypatch.setattr(sources.TextSource, "chunks", counted)
    monkeypatch.setattr(measured._Measurement, "_add", add)
    found = evaluate_text(model, CHARACTERS, file)
    assert read == found.bytes == len(text)
    assert ahead < 600
    assert len(found.parts.nats) <= 8
    assert found.parts.bytes.sum() == found.bytes
    assert found.parts.nats.sum() == pytest.approx(found.loss * found.scored_tokens)
    assert (found.parts.bytes[:-1] == found.parts.size).all()


def test_parts_belong_to_the_text_whatever_the_tokenizer(tmp_path: Path, words: str, bpe: Tokenizer) -> None:
    """So two models with different tokenizers can be compared part by part."""
    (file := tmp_path / "text.txt").write_text(words[:20_000])
    characters = train_char([words])
    by_character = evaluate_text(tiny_model(vocab_size=40), characters, file)
    by_pair = evaluate_text(tiny_model(vocab_size=300), bpe, file)
    assert by_character.parts.bytes.tolist() == by_pair.parts.bytes.tolist()
    assert by_character.sha256 == by_pair.sha256
    assert (by_character.parts.tokens[1:-1] == by_character.parts.size).all()
    for part in range(3):  # each part's tokens are those that begin in it
        ids = bpe.encode(words[: (part + 1) * by_pair.parts.size])
        assert by_pair.parts.tokens[: part + 1].sum() == pytest.approx(len(ids) - 1, abs=1)


def test_many_documents_are_resampled_as_documents(model: Transformer, tmp_path: Path) -> None:
    texts = make_texts(60)
    found = evaluate_text(model, CHARACTERS, rows_file(tmp_path / "rows.jsonl", texts), per_document=True)
    assert (found.parts.unit, found.parts.size) == ("documents", 1)
    nats = [(one.loss or 0) * one.tokens for one in found.per_document]
    assert found.parts.nats == pytest.approx(nats)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(2000):
        chosen = rng.integers(0, 60, 60)
        drawn.append(sum(nats[i] for i in chosen) / sum(len(texts[i]) for i in chosen))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.values["loss_low"] == pytest.approx(low, abs=0.15 * (high - low))
    assert found.values["loss_high"] == pytest.approx(high, abs=0.15 * (high - low))
    assert found.values["perplexity_low"] == pytest.approx(math.exp(found.values["loss_low"]))


def test_a_short_text_has_no_interval(model: Transformer, tmp_path: Path) -> None:
    (file := tmp_path / "text.txt").write_text("abc def")
    assert set(evaluate_text(model, CHARACTERS, file).values) == {"loss", "perplexity", "bits_per_byte"}


def test_loss_by_position_and_the_in_context_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "EARLY", 4)
    monkeypatch.setattr(measured, "LATE", 20)
    model = tiny_model(vocab_size=CHARACTERS.vocab_size, max_position_embeddings=CONTEXT)
    text = "".join(make_texts(20))
    (file := tmp_path / "text.txt").write_text(text)
    found = evaluate_text(model, CHARACTERS, file, options=TextOptions(stride=CONTEXT))
    ids = CHARACTERS.encode(text)
    every = [losses(model, ids[start : start + CONTEXT]) for start in range(0, len(ids), CONTEXT)]
    for first, last, loss, tokens in found.positions:
        places = [row[place - 2] for row in every for place in range(first, last + 1) if place - 2 < len(row)]
        assert loss == pytest.approx(sum(places) / len(places), rel=1e-5)
        assert tokens == len(places)
    assert [first for first, *_ in found.positions] == [2, *(last + 1 for _, last, *_ in found.positions[:-1])]
    assert found.positions[-1][1] == CONTEXT
    differences = [row[18] - row[2] for row in every if len(row) > 18]
    assert found.in_context["windows"] == len(differences)
    assert found.in_context["score"] == pytest.approx(np.mean(differences), rel=1e-4)
    assert found.in_context["score_low"] < found.in_context["score"] < found.in_context["score_high"]


def test_a_short_context_has_no_in_context_score(model: Transformer, tmp_path: Path) -> None:
    (file := tmp_path / "text.txt").write_text("abc def" * 100)
    found = evaluate_text(model, CHARACTERS, file)
    assert found.in_context == {}
    assert found.to_json()["in_context"] is None


class Copying(torch.nn.Module):
    """Expects what followed the last token when it occurred before, otherwise any token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.weight = config, torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, ids.shape[1], self.config.vocab_size)
        row = ids[0].tolist()
        for place, id in enumerate(row):
            if id in row[:place]:
                last = max(i for i in range(place) if row[i] == id)
                logits[0, place, row[last + 1]] = 9.0
        return logits


def test_induction() -> None:
    tokenizer = train_char([chr(code) for code in range(0x4E00, 0x4E00 + 2000)])
    config = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=64).config
    copying: Any = Copying(config)
    found = induction(copying, tokenizer, sequences=10)
    assert (found["length"], found["sequences"]) == (32, 10)
    assert found["accuracy"] > 0.95  # a token that was drawn twice can mislead
    assert found["second_loss"] < 1 < 5 < found["first_loss"]
    random = induction(tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=64), tokenizer, sequences=10)
    assert random["accuracy"] < 0.05
    assert induction(copying, tokenizer, sequences=10) == found
    with pytest.raises(UsageError, match="2 to 32"):
        induction(copying, tokenizer, length=33)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused_by_name(model: Transformer, tmp_path: Path) -> None:
    def written(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    good = written("good.txt", b"abc def")
    cases: tuple[tuple[Path, dict[str, Any], type[Exception], str], ...] = (
        (written("empty.txt", b""), {}, DataError, "empty.txt is empty"),
        (written("unknown.txt", b"abc\nxyz"), {}, TokenizerError, "unknown.txt.*'x'"),
        (written("short.txt", b"a"), {}, UsageError, "short.txt is too short.*fewer than two tokens"),
        (written("binary.txt", b"a\0b"), {}, DataError, "binary.txt is a binary file"),
        (written("null.jsonl", b'{"text": null}\n'), {}, DataError, "null.jsonl holds no text"),
        (written("other.jsonl", b'{"body": "abc"}\n'), {}, DataError, "text"),
        (tmp_path / "nowhere.txt", {}, UsageError, "no such file.*nowhere.txt"),
        (good, {"stride": 25}, UsageError, "--stride must be between 1 and the context of 24 tokens.*not 25"),
        (good, {"stride": 0}, UsageError, "--stride"),
        (good, {"context": 25}, UsageError, "--context must be between 2 and the model's context of 24"),
        (good, {"context": 8, "stride": 9}, UsageError, "--stride must be between 1 and the context of 8"),
    )
    for path, options, error, message in cases:
        with pytest.raises(error, match=message):
            evaluate_text(model, CHARACTERS, path, options=TextOptions(**options))
    with pytest.raises(UsageError, match="--field body has no use"):
        evaluate_text(model, CHARACTERS, good, field="body")


def test_unknown_tokens_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_char(["abc "], unknown=True)
    (file := tmp_path / "text.txt").write_text("abc xyz abc")
    found = evaluate_text(tiny_model(vocab_size=tokenizer.vocab_size), tokenizer, file)
    assert found.unknown == 3
    assert "3 of 11 tokens are unknown to the tokenizer and count as the unknown token" in capsys.readouterr().err


def test_a_damaged_model_is_refused(model: Transformer, tmp_path: Path) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    (file := tmp_path / "text.txt").write_text("abc def")
    with pytest.raises(GptsmithError, match="not a number"):
        evaluate_text(model, CHARACTERS, file)


def test_a_separator_that_the_model_lacks_is_not_used(tmp_path: Path) -> None:
    """The end-of-text token was added to the tokenizer, without an embedding in the model."""
    tokenizer = train_char(["abc "])
    assert tokenizer.eos_id is not None
    lacking = tokenizer.limited_to(tokenizer.vocab_size)
    lacking.vocab_size = lacking.eos_id = tokenizer.vocab_size - 1
    model = tiny_model(vocab_size=lacking.vocab_size)
    rows = rows_file(tmp_path / "rows.jsonl", ["aba", "ab a"])
    for join, scored in ((False, 5), (True, 6)):
        found = evaluate_text(model, lacking, rows, options=TextOptions(join=join))
        assert (found.start, found.scored_tokens) == ((), scored)


def test_options_are_checked_before_anything_is_measured(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document has a separator before it, which leaves less room than a text has."""
    (text := tmp_path / "text.txt").write_text("abc def")
    rows = rows_file(tmp_path / "rows.jsonl", ["abc", "ab c"])
    monkeypatch.setattr(measured, "window_losses", None)
    with pytest.raises(UsageError, match="--stride"):
        evaluate_texts(model, CHARACTERS, [text, rows], options=TextOptions(stride=CONTEXT, prefix="every"))


def test_progress_is_the_share_that_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is read in blocks that are larger than what is scored at a time."""
    advances: list[float] = []

    class Bar:
        def advance(self, amount: float) -> None:
            advances.append(amount)

    @contextlib.contextmanager
    def recorded(total: float, *_: str) -> Iterator[Bar]:
        yield Bar()

    monkeypatch.setattr(measured, "progress", recorded)
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 400)
    path = tmp_path / "long.txt"
    path.write_text("abcdefghij" * 400)
    model = tiny_model("llama", vocab_size=CHARACTERS.vocab_size, max_position_embeddings=CONTEXT)
    evaluate_text(model, CHARACTERS, path)
    shown = np.cumsum(advances) / 4000
    assert min(advances) >= 0
    assert shown[-1] == pytest.approx(1, abs=1e-3)  # the first token is not scored
    assert np.abs(shown - np.arange(1, len(shown) + 1) / len(shown)).max() < 0.11  # the next chunk may be read already
