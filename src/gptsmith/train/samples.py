"""Samples of what the model writes: a preview at each evaluation, and a few for the report at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.text import engine_for, stream
from gptsmith.errors import TokenizerError
from gptsmith.log import JsonLines
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import Run
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.callbacks import Callback
from gptsmith.train.config import LoopConfig
from gptsmith.train.display import Display

PREVIEW_TEMPERATURE = 0.8
REPORT_TEMPERATURES = (0.2, 0.8, 1.2)


class Samples(Callback):
    """Write samples into samples.jsonl and show them.

    should_stop: where it returns True, generation ends and the unfinished text is not kept.
    """

    def __init__(
        self,
        loop: LoopConfig,
        model: Transformer,
        tokenizer: Tokenizer,
        display: Display,
        should_stop: Callable[[], bool],
    ) -> None:
        self.loop, self.model, self.tokenizer = loop, model, tokenizer
        self.display, self.should_stop = display, should_stop
        self._failed = ""  # why the last sample failed

    def on_evaluation(self, run: Run, row: Mapping[str, Any]) -> None:
        if self.loop.sample_tokens and row["step"] < self.display.steps:
            self.display.say("sampling")
            text = self._write(run, row["step"], PREVIEW_TEMPERATURE, self.loop.sample_tokens, final=False)
            if text is not None:
                self.display.sample(text)

    def write_final(self, run: Run, step: int) -> None:
        """Write the samples of the report, which are twice as long."""
        if not self.loop.sample_tokens:
            return
        for temperature in REPORT_TEMPERATURES:
            self.display.say("sampling")
            text = self._write(run, step, temperature, 2 * self.loop.sample_tokens, final=True)
            if self.should_stop() or text is None:
                return
            self.display.print(f"at temperature {temperature}:")
            self.display.sample(text)

    def _write(self, run: Run, step: int, temperature: float, length: int, *, final: bool) -> str | None:
        """Write a sample and return its text; None, with a note, if there is none. A sample never ends a run."""
        prompt = self.loop.sample_prompt
        try:
            if not self.tokenizer.encode(prompt):
                prompt = ""
        except TokenizerError:
            prompt = ""
        try:
            text = self._generate(prompt, length, temperature)
            if not self.should_stop():
                JsonLines(run.directory / "samples.jsonl").append(
                    step=step, temperature=temperature, prompt=prompt, text=text, final=final
                )
            return text
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if reason != self._failed:  # not again at every evaluation
                self.display.print(f"no sample: {reason}")
            self._failed = reason
            return None

    def _generate(self, prompt: str, length: int, temperature: float) -> str:
        params = SamplingParams(max_tokens=length, temperature=temperature, seed=self.loop.seed, overflow="shift")
        text = ""
        for chunk in stream(engine_for(self.model, self.tokenizer, params), self.tokenizer, prompt, params):
            if self.should_stop():
                return ""
            text += chunk.text
        return text
