"""Samples of what the model writes: a preview at each evaluation, and a few for the report at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
ANSWER_TEMPERATURE = 0.2  # of answers to prompts of the data
REPORT_TEMPERATURES = (0.2, 0.8, 1.2)


Prompt = tuple[str, list[int]]


class Samples(Callback):
    """Write samples into samples.jsonl and show them.

    should_stop: where it returns True, generation ends and the unfinished text is not kept. prompts: what is continued,
    as text and as ids (default: the text of `loop.sample_prompt`): all of them before training and at its end, the
    first one in between. stop: texts that end an answer, besides the model's end tokens.
    """

    def __init__(
        self,
        loop: LoopConfig,
        model: Transformer,
        tokenizer: Tokenizer,
        display: Display,
        should_stop: Callable[[], bool],
        prompts: Sequence[Prompt] | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.prompts, self.stop = prompts, tuple(stop)
        self.loop, self.model, self.tokenizer = loop, model, tokenizer
        self.display, self.should_stop = display, should_stop
        self._failed = ""  # why the last sample failed

    def on_evaluation(self, run: Run, row: Mapping[str, Any]) -> None:
        if self.loop.sample_tokens and row["step"] < self.display.steps:
            prompts: list[Prompt | None] = [*self.prompts] if self.prompts else [None]
            for prompt in prompts if row["step"] == 0 else prompts[:1]:
                self.display.say("sampling")
                temperature = PREVIEW_TEMPERATURE if prompt is None else ANSWER_TEMPERATURE
                text = self._write(run, row["step"], temperature, self.loop.sample_tokens, prompt, final=False)
                if text is None:
                    return
                self.display.sample(text)

    def write_final(self, run: Run, step: int) -> None:
        """Write the samples of the report, which are twice as long."""
        if not self.loop.sample_tokens:
            return
        wanted: list[tuple[float, Prompt | None]] = [(temperature, None) for temperature in REPORT_TEMPERATURES]
        if self.prompts:
            wanted = [(ANSWER_TEMPERATURE, prompt) for prompt in self.prompts]
        for temperature, prompt in wanted:
            self.display.say("sampling")
            text = self._write(run, step, temperature, 2 * self.loop.sample_tokens, prompt, final=True)
            if self.should_stop() or text is None:
                return
            self.display.print(f"at temperature {temperature}:" if prompt is None else f"{prompt[0][-200:]!r}:")
            self.display.sample(text)

    def _write(
        self, run: Run, step: int, temperature: float, length: int, prompt: Prompt | None, *, final: bool
    ) -> str | None:
        """Write a sample and return its text; None, with a note, if there is none. A sample never ends a run."""
        shown, ids = prompt or (self.loop.sample_prompt, None)
        try:
            if ids is None and not self.tokenizer.encode(shown):
                shown = ""
        except TokenizerError:
            shown = ""
        try:
            text = self._generate(shown if ids is None else ids, length, temperature)
            if not self.should_stop():
                JsonLines(run.directory / "samples.jsonl").append(
                    step=step, temperature=temperature, prompt=shown, text=text, final=final
                )
            return text
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if reason != self._failed:  # not again at every evaluation
                self.display.print(f"no sample: {reason}")
            self._failed = reason
            return None

    def _generate(self, prompt: str | list[int], length: int, temperature: float) -> str:
        params = SamplingParams(
            max_tokens=length, temperature=temperature, stop=self.stop, seed=self.loop.seed, overflow="shift"
        )
        text = ""
        for chunk in stream(engine_for(self.model, self.tokenizer, params), self.tokenizer, prompt, params):
            if self.should_stop():
                return ""
            text += chunk.text
        return text
