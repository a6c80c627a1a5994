"""`gptsmith chat` through a pseudo-terminal and through a pipe."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptsmith.checkpoint import save_checkpoint
from gptsmith.cli import chat
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import UsageError
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char
from tests.channels import channel_model, channel_tokenizer
from tests.factories import tiny_model

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(vocab_size: int, context: int = 200) -> Transformer:
    return tiny_model(
        "qwen3",
        seed=1,
        vocab_size=vocab_size,
        num_hidden_layers=1,
        intermediate_size=16,
        max_position_embeddings=context,
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    base = train_bpe(["the quick brown fox jumps over the lazy dog. " * 3], 300)
    return Tokenizer(base.to_json(), base.config() | {"chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    save_checkpoint(path, make_model(tokenizer.vocab_size), tokenizer)
    return path


@pytest.fixture
def say(run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, model_directory: Path) -> Any:
    def say(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return run_cli("chat", model_directory, "--device", "cpu", "--max-tokens", "12", "--seed", "1", *options)

    return say


def test_a_conversation(say: Any, tmp_path: Path) -> None:
    code, out, err = say("hello", "and\\", "then?", f"/save {tmp_path / 'talk.json'}", "/quit", "not reached")
    assert code == 0, err
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [m["role"] for m in saved] == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in saved if m["role"] == "user"] == ["hello", "and\nthen?"]
    answers = [m["content"] for m in saved if m["role"] == "assistant"]
    assert all(answer.strip() in out for answer in answers)
    assert "no chat template" not in err


def test_commands(say: Any, tmp_path: Path) -> None:
    lines = [
        "/help",
        "/system be brief",
        "hi",
        "/temperature 0",
        "/reset",
        "/tempurature 1",
        "/temperature x",
        "/save",
    ]
    code, _, err = say(*lines, "/temperature -3", f"/save {tmp_path / 'a' / 'b'}", f"/save {tmp_path / 'c'}")
    assert code == 0
    assert "/reset" in err
    assert "with a system prompt" in err
    assert "temperature 0" in err
    assert "Did you mean 'temperature'?" in err
    assert "needs a number, not 'x'" in err
    assert "/save needs the name of a file" in err
    assert "must be at least 0" in err
    assert str(tmp_path / "a") in err
    assert json.loads((tmp_path / "c").read_text()) == {"messages": [{"role": "system", "content": "be brief"}]}


def test_earlier_turns_are_cached(tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(tokenizer.vocab_size, 900), vocab_size=tokenizer.vocab_size, block_size=4)
    talk = chat.Conversation(engine, tokenizer, SamplingParams(max_tokens=20, seed=0))
    for text in ("the quick brown fox jumps over the lazy dog " * 3, "and", "then"):
        list(talk.answer(text))
    assert engine.stats.prefix_hit_rate > 0.4
    assert engine.stats.blocks_used == 0


def test_an_interrupted_answer_is_kept(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    engine = Engine(make_model(tokenizer.vocab_size), vocab_size=tokenizer.vocab_size)
    talk = chat.Conversation(engine, tokenizer, SamplingParams(max_tokens=100, seed=0))

    class Output(io.StringIO):
        def flush(self) -> None:
            if len(self.getvalue()) > 10:
                raise KeyboardInterrupt

    output = Output()
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(KeyboardInterrupt):  # from the final newline: every flush of this output interrupts
        chat._speak(talk, "hello")
    monkeypatch.undo()
    assert "(stopped)" in capsys.readouterr().err
    assert talk.turns[-1]["role"] == "assistant"
    assert talk.turns[-1]["content"].startswith(output.getvalue().strip())
    assert engine.stats.blocks_used == 0
    list(talk.answer("go on"))
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2


def test_a_full_context_drops_the_oldest_turns_with_a_note(tokenizer: Tokenizer, capsys: Any) -> None:
    engine = Engine(make_model(tokenizer.vocab_size, 100), vocab_size=tokenizer.vocab_size)
    talk = chat.Conversation(engine, tokenizer, SamplingParams(max_tokens=20, seed=0), "be kind")
    for _ in range(6):
        list(talk.answer("hello there"))
    assert "dropped: the context is full" in capsys.readouterr().err
    assert talk.messages[0] == {"role": "system", "content": "be kind"}
    with pytest.raises(UsageError, match="too long"):
        list(talk.answer("word " * 200))
    assert len(talk.turns) == 12  # the turn that was too long was removed


def test_a_missing_chat_template_is_noted(tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_bpe(["User: Assistant: " * 9], 270)
    save_checkpoint(tmp_path / "model", make_model(plain.vocab_size), plain)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    code, _, err = run_cli("chat", tmp_path / "model", "--device", "cpu", "--max-tokens", "5")
    assert code == 0
    assert "no chat template" in err


def test_a_model_without_the_letters_of_the_speakers_names(
    tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train_char(["hello\n"])
    save_checkpoint(tmp_path / "model", make_model(plain.vocab_size), plain)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nhello\n"))
    code, out, err = run_cli("chat", tmp_path / "model", "--device", "cpu", "--max-tokens", "9", "--seed", "1")
    assert code == 0, err
    assert "each turn is a line of text" in err
    assert len(out.splitlines()) == 2


def test_overflow(tokenizer: Tokenizer, capsys: Any) -> None:
    """error: the turn is refused. shift: the answer continues beyond the context. truncate: it ends there."""
    engine = Engine(make_model(tokenizer.vocab_size, 100), vocab_size=tokenizer.vocab_size)
    strict = chat.Conversation(engine, tokenizer, SamplingParams(max_tokens=20, seed=0), overflow="error")
    list(strict.answer("hello there"))
    with pytest.raises(UsageError, match="Use /reset to start over"):
        list(strict.answer("hello there " * 9))
    assert len(strict.turns) == 2
    assert strict.turns[-1]["role"] == "assistant"  # the refused turn was removed
    assert "dropped" not in capsys.readouterr().err
    params = SamplingParams(max_tokens=300, seed=0, temperature=3.0, logit_bias={tokenizer.eos_id or 0: float("-inf")})
    overflows: list[chat.Overflow] = ["truncate", "shift"]
    for overflow in overflows:
        talk = chat.Conversation(engine, tokenizer, params, overflow=overflow)
        before = engine.stats.generated_tokens
        list(talk.answer("hello"))
        generated = engine.stats.generated_tokens - before
        err = capsys.readouterr().err
        assert generated == 300 if overflow == "shift" else generated < 100
        assert ("the oldest tokens are forgotten" in err) == (overflow == "shift")
        assert bool(re.search(r"stopped after \d+ tokens: the context is full", err)) == (overflow == "truncate")


def test_stats_report_speed_and_cached_tokens(say: Any, model_directory: Path) -> None:
    for options in (("--prompt-lookup",), ("--draft-model", str(model_directory))):
        code, _, err = say("the quick brown fox " * 2, "the quick brown fox", "/stats", options=options)
        assert code == 0, err
        assert re.search(r"24 tokens, .* tok/s; \d+ of \d+ prompt tokens cached \(\d+%\)", err.splitlines()[-1])
    assert say("hi", options=("--prompt-lookup", "--draft-model", "x"))[0] == 2


def test_reasoning_is_shown_and_forgotten(tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers in channels: standard output has the final text alone, and so has the history."""
    save_checkpoint(tmp_path / "model", channel_model(), channel_tokenizer())
    saved = tmp_path / "saved.json"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hi\n/save {saved}\n/reset\ngo\n"))
    code, out, err = run_cli("chat", tmp_path / "model", "--device", "cpu", "--temperature", "0")
    assert (code, out) == (0, "Hello you\n\n"), err
    assert err.count("(thinking) I think.\n") == 2
    assert '(the model calls a function, and there is none here: f {"x": 7})' in err
    assert json.loads(saved.read_text())["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello you"},
    ]


def test_an_answer_that_is_stopped_while_the_model_thinks() -> None:
    engine = Engine(channel_model(), vocab_size=channel_tokenizer().vocab_size)
    talk = chat.Conversation(engine, channel_tokenizer(), SamplingParams(temperature=0))
    answer: Any = talk.answer("hi")
    assert next(chunk.reasoning for chunk in answer if chunk.reasoning).startswith("I")
    answer.close()
    assert talk.turns[-1] == {"role": "assistant", "content": ""}
    assert engine.stats.blocks_used == 0
    (*_, last) = talk.answer("hi")
    assert last.finish_reason == "stop"
    assert "think" not in channel_tokenizer().decode(list(talk._fitting()[0].ids))


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_ctrl_c_stops_an_endless_answer(model_directory: Path, tmp_path: Path) -> None:
    """An answer of 9 million tokens, which only Ctrl-C can have ended so soon."""
    import pexpect

    options = [str(model_directory), "--max-tokens", "9000000", "--temperature", "3", "--overflow", "shift"]
    child: Any = pexpect.spawn(
        sys.executable,
        ["-c", "import sys; from gptsmith.cli import main; sys.exit(main(sys.argv[1:]))", "chat", *options],
        env={**os.environ, "GPTSMITH_CACHE": str(tmp_path), "TERM": "xterm"},
        timeout=300,
        encoding="utf-8",
        codec_errors="replace",
    )
    child.expect("> ")
    for _ in range(20):  # the end-of-text token may end it first
        child.sendline("hello")
        if child.expect_exact(["the oldest tokens are forgotten", "\n> "]) == 1:
            continue
        child.sendintr()
        if child.expect_exact(["(stopped)", "\n> "]) == 0:
            break
    else:
        raise AssertionError("no answer was long enough to be stopped")
    child.expect("> ")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_ctrl_c_stops_the_answer_but_not_the_program(model_directory: Path, tmp_path: Path) -> None:
    """In a pseudo-terminal: interrupt an answer, continue, interrupt the prompt, exit with Ctrl-D."""
    import pexpect

    options = ["--device", "cpu", "--max-tokens", "90000", "--temperature", "3"]
    child: Any = pexpect.spawn(
        sys.executable,
        ["-c", "import sys; from gptsmith.cli import main; main(sys.argv[1:])", "chat", str(model_directory), *options],
        env={**os.environ, "GPTSMITH_CACHE": str(tmp_path), "TERM": "xterm"},
        timeout=120,
        encoding="utf-8",
        codec_errors="replace",
    )
    child.expect("> ")
    for _ in range(20):  # the end-of-text token may end an answer before the interrupt
        child.sendline("hello")
        child.expect_exact("hello\r\n")
        if child.expect([r"[a-z]", r"\n> "]) == 1:
            continue
        child.sendintr()
        if child.expect_exact(["(stopped)", "\n> "]) == 0:
            child.expect_exact("\n> ")
            break
    else:
        raise AssertionError("no answer was long enough to be stopped")
    child.sendline("/temperature 0")
    child.expect_exact("/temperature 0\r\n")
    child.expect_exact("temperature 0")
    child.expect_exact("\n> ")
    child.sendintr()
    child.expect("Ctrl-D or /quit exits")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "hello" in (tmp_path / "chat_history").read_text()
    assert (tmp_path / "chat_history").stat().st_mode & 0o077 == 0
