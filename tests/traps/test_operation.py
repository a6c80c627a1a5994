"""Public reports about running and exporting fine-tuning, replayed. Each docstring names the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

import gptsmith
from gptsmith.checkpoint import save_checkpoint
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import CheckpointError, UsageError
from gptsmith.tokenizer import Tokenizer, train_char
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.pretrained import read_tokenizer
from tests.factories import tiny_model
from tests.traps.test_adapters import LETTERS, QUIET, base, chats, run

__all__ = ["base", "chats", "run"]  # fixtures


def test_B7_the_template_of_training_is_exported(run: gptsmith.Run) -> None:
    """axolotl #834, #1832, litgpt #1986, LLaMA-Factory #6320, ollama #6823: the model is served with another template
    than it was trained with, or with none."""
    _, ours = gptsmith.load(run)
    theirs = transformers.AutoTokenizer.from_pretrained(run.directory / "best")
    messages = [{"role": "user", "content": "Say 3"}]
    ids = ChatTemplate(ours).encode(messages)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
    assert ours.decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\n")


def test_B8_a_text_ends_at_any_of_several_end_tokens(tmp_path: Path) -> None:
    """TRL #7039: only one end token is honored, so nearly all answers of Phi 3.5 were said to be cut."""
    tokenizer = train_char([LETTERS])
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    save_checkpoint(tmp_path / "model", model, tokenizer)
    second = tokenizer.encode("~")[0]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "model" / name).read_text()) | {
            "eos_token_id": [config["eos_token_id"], second]
        }
        (tmp_path / "model" / name).write_text(json.dumps(values))
    ends = read_tokenizer(tmp_path / "model").end_ids
    assert set(ends) == {tokenizer.eos_id, second}
    finished = {}
    for end in ends:
        params = SamplingParams(max_tokens=5, temperature=0.0, stop_ids=ends, logit_bias={end: 100.0})
        completion = Engine(model).generate([[1, 2]], params)[0].completions[0]
        finished[end] = (completion.ids, completion.finish_reason)
    assert finished == {end: ([end], "stop") for end in ends}


def test_G1_a_run_that_is_not_there_is_not_started_anew(base: Path, chats: Path, tmp_path: Path) -> None:
    """open-instruct #1823: with a misspelled path the run silently began again from the base model."""
    with pytest.raises(CheckpointError, match="there is no run directory"):
        gptsmith.fit(resume=tmp_path / "runs" / "missspelled")


def test_G2_a_misspelled_option_is_an_error(base: Path, chats: Path, tmp_path: Path) -> None:
    """unsloth #10740: an option that had been renamed silently had its default value."""
    with pytest.raises(UsageError, match=r"epoch.*Did you mean.*epochs"):
        gptsmith.sft(base, chats, out=tmp_path / "run", epoch=3, **QUIET)
    assert not (tmp_path / "run").exists()


def test_G4_forgetting_is_measured(run: gptsmith.Run) -> None:
    """unsloth #2502, litgpt #1517, DeepSeek-Coder #134: "how do I measure what the model has forgotten?" """
    measured = {row["step"]: row["text_bits_per_byte"] for row in run.metrics if "text_bits_per_byte" in row}
    assert set(measured) == {0, 4}
    assert measured[0] != measured[4]


def test_the_tokenizer_of_the_base_has_no_template(base: Path) -> None:
    """What the tests above rest on: the template comes from fine-tuning."""
    tokenizer: Tokenizer = read_tokenizer(base)
    assert not tokenizer.config().get("chat_template")
