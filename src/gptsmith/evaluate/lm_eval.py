"""gptsmith as a model of EleutherAI's lm-evaluation-harness.

    lm_eval --model gptsmith --model_args pretrained=runs/bard --tasks piqa

finds it through `gptsmith.lm_eval_plugin`; `python -m gptsmith.evaluate.lm_eval` is the same command, with errors in
one line. From Python, importing this module registers the model:
`lm_eval.simple_evaluate(model="gptsmith", model_args={"pretrained": …})`.

Texts are encoded as its Hugging Face backend encodes them, so scores are equal item by item. Log-probabilities come
from `evaluate.scoring`, which computes shared prefixes once; generated texts come from the engine.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.text import generate_texts
from gptsmith.errors import GptsmithError, TokenizerError, UsageError
from gptsmith.evaluate.provenance import weights_sha256
from gptsmith.evaluate.scoring import Continuation, Scorer
from gptsmith.loading import Quantization, load_model, resolve_adapter
from gptsmith.log import note, progress
from gptsmith.model.flops import count_parameters
from gptsmith.runtime import choose_device
from gptsmith.tokenizer.chat import ChatTemplate

try:
    import lm_eval.models  # noqa: F401  # registers the harness's own models, before this one
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
except ImportError as error:
    raise GptsmithError(
        f"the lm-evaluation-harness cannot be imported ({error}). Install it: pip install lm_eval"
    ) from None

REQUESTS_AT_ONCE = 256  # between two updates of the progress bar
_DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
_SAMPLING = {"top_p", "top_k", "min_p", "typical_p", "repetition_penalty"}


@register_model("gptsmith")
class GptsmithLM(TemplateLM):  # type: ignore[misc]  # the harness is not typed
    """A model of this package.

    pretrained: a MODEL as in all commands: a run, a model directory, a .gguf file, ORG/NAME on the hub, smollm2-135m.
    dtype, quantize, adapter, device: as in `gptsmith eval`. max_length: tokens, at most the context. add_bos_token:
    whether texts begin with a beginning-of-sequence token (default: as the tokenizer says). prefix_token_id: the token
    before texts without a context (default: beginning of sequence, else end of text). seed: of sampled texts.
    batch_size and max_batch_size are the harness's; results do not depend on them, and they are not used.
    Raises UsageError for arguments that this model does not have.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        quantize: Quantization = "auto",
        adapter: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 1234,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UsageError(f"--model gptsmith has no argument {', '.join(unknown)}. Leave it out of --model_args.")
        if dtype not in _DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype}.")
        folded = None if adapter is None else resolve_adapter(adapter)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness names cuda:0 if no device is chosen
        self._device = choose_device(device or "auto")
        self.model, self.own_tokenizer = load_model(
            pretrained, device=self._device, dtype=_DTYPES[dtype], quantize=quantize, adapter=folded
        )
        context = self.model.config.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= context:
            raise UsageError(f"max_length must be between 1 and the context of {context:,} tokens, not {max_length}.")
        self.max_length = max_length or context
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.add_bos_token = add_bos_token
        self.scorer = Scorer(self.model, self.own_tokenizer)
        self.engine = Engine(self.model, vocab_size=self.own_tokenizer.vocab_size)
        self.template = ChatTemplate(self.own_tokenizer)
        self._prefix_token_id = prefix_token_id
        special = self.own_tokenizer.special_tokens()
        self._special = tuple(text for text in special.values() if text)
        self._eos = special.get(self.own_tokenizer.eos_id) if self.own_tokenizer.eos_id is not None else None
        self._pipeline: Any = None

    # Tokens -----------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self._token("end", self.own_tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        own = self.own_tokenizer
        chosen = next((id for id in (self._prefix_token_id, own.bos_id, own.eos_id) if id is not None), None)
        return self._token("beginning or the end", chosen)

    def _token(self, what: str, id: int | None) -> int:
        if id is None or id >= self.own_tokenizer.vocab_size:  # the model may lack it
            raise UsageError(f"the tokenizer has no token for the {what} of a text: name one with prefix_token_id=ID.")
        return id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text. Spellings of special tokens become these tokens, as in the harness's other models:
        chat templates write them.

        add_special_tokens: whether to put the tokenizer's tokens around it; None: as `add_bos_token` says, but not a
        second time. Raises TokenizerError for characters that the tokenizer lacks.
        """
        own = self.own_tokenizer
        if any(text in string for text in self._special):
            ids = self._encode_special(string)
        else:
            ids = own.encode(string)
        if add_special_tokens is None:
            first = own.bos_id if own.bos_id is not None else own.eos_id
            begun = first is not None and string.startswith(own.special_tokens().get(first) or "\0")
            add_special_tokens = False if begun else self.add_bos_token
        if add_special_tokens is False:
            return ids
        before = own.prefix_ids
        if add_special_tokens and not before and own.bos_id is not None:
            before = (own.bos_id,)
        return [*before, *ids, *own.suffix_ids]

    def _encode_special(self, text: str) -> list[int]:
        own = self.own_tokenizer
        if not own.covers_all_text:  # raises for characters that would be lost
            own.encode(text)
        if self._pipeline is None:
            from tokenizers import Tokenizer as Pipeline

            self._pipeline = Pipeline.from_str(own.to_json())
            self._pipeline.no_padding()
            self._pipeline.no_truncation()
        ids: list[int] = self._pipeline.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and its continuation, as the harness cuts them.

        Where the boundary is inside the last token, so that nothing would be left to score, the cut is before it.
        """
        before, after = super()._encode_pair(context, continuation)
        if after:
            return before, after
        whole = self.tok_encode(context + continuation)
        common = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole) - 1)
        common = min(common, len(whole) - 1)
        return (whole[:common] or [self.prefix_token_id]), whole[common:]

    # Scores -----------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is what greedy decoding writes. Contexts
        that are too long lose their beginning."""
        found: list[tuple[float, bool]] = []
        cut = 0
        pairs = []
        for _text, context, continuation in requests:
            if not continuation:
                raise UsageError("a text to score is empty: the task has an empty choice or target.")
            if len(continuation) > self.max_length:
                raise UsageError(f"a text to score has {len(continuation)} tokens, more than {self.max_length}.")
            both = (context + continuation)[-(self.max_length + 1) :]
            cut += len(both) < len(context) + len(continuation)
            split = len(both) - len(continuation)
            pairs.append(Continuation(tuple(both[:split]), tuple(both[split:])))
        if cut:
            note(f"note: {cut:,} contexts are longer than {self.max_length:,} tokens and lose their beginning.")
        with progress(sum(len(pair.context) + len(pair.ids) for pair in pairs), "Scoring") as bar:
            scores = self.scorer.score(pairs, on_progress=bar.advance)
        for (text, *_ids), score in zip(requests, scores, strict=True):
            answer = (score.total, score.greedy)
            found.append(answer)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in windows of the context that score every token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Generated texts --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to a stop string. Contexts that are too long lose their
        beginning. Of requests that are the same and sampled, each has its own random numbers."""
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        seen: Counter[str] = Counter()
        for number, request in enumerate(requests):
            context, options = request.args
            written = json.dumps(options, sort_keys=True, default=str)
            groups[written, seen[f"{context}\0{written}"]].append(number)
            seen[f"{context}\0{written}"] += 1
        texts = [""] * len(requests)
        with progress(len(requests), "Generating") as bar:
            for (_, repeat), numbers in groups.items():
                params = self._params(requests[numbers[0]].args[1], self.seed + repeat)
                room = self.max_length - params.max_tokens
                if room < 1:
                    raise UsageError(
                        f"{params.max_tokens} tokens to generate leave no room for a prompt in the context of "
                        f"{self.max_length}: use --gen_kwargs max_gen_toks=N or --model_args max_gen_toks=N."
                    )
                for start in range(0, len(numbers), REQUESTS_AT_ONCE):
                    part = numbers[start : start + REQUESTS_AT_ONCE]
                    prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in part]
                    made = generate_texts(self.engine, self.own_tokenizer, prompts, params, continues_prompt=False)
                    for i, (text,) in zip(part, made, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.advance(len(part))
        return texts

    def _params(self, options: dict[str, Any], seed: int) -> SamplingParams:
        """Return the sampling parameters for the harness's generation arguments. Raises UsageError for others."""
        values = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        max_tokens = values.pop("max_gen_toks")
        stop = handle_stop_sequences(values.pop("until", None), eos=self._eos)
        sampled = values.pop("do_sample", None)
        temperature = float(values.pop("temperature", 0.0) or 0.0)
        chosen = {name: values.pop(name) for name in list(values) if name in _SAMPLING}
        if values:
            raise UsageError(f"--model gptsmith cannot generate with {', '.join(map(str, values))}: leave it out.")
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if sampled is False else temperature,
            stop=tuple(text for text in stop if text),
            seed=seed,
            **chosen,
        )

    # Chat templates ---------------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its cache of rendered prompts after."""
        return f"gptsmith-{self.own_tokenizer.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's chat template; None without `--apply_chat_template`."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            raise UsageError("--apply_chat_template takes no name: gptsmith's models have one chat template.")
        self._refuse_plain()
        return self.template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text; without `add_generation_prompt` up to the end of the last message.

        Where the template refuses messages of the system, they are left out, with a note.
        """
        self._refuse_plain()
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except TokenizerError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            note("note: the chat template does not take messages of the system; they are left out.")
            return self._rendered(others, add_generation_prompt)

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self.template.render(messages)
        return self.template.render_open(messages)

    def _refuse_plain(self) -> None:
        if self.template.plain:
            raise UsageError("the model's tokenizer has no chat template: leave out --apply_chat_template.")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results about the model."""
        return {
            "model_num_parameters": count_parameters(self.model.config).total,
            "model_dtype": str(next(self.model.parameters()).dtype),
            "model_sha": weights_sha256(self.model),
            "tokenizer_sha": self.own_tokenizer.fingerprint,
        }


def main(arguments: Sequence[str]) -> int:
    """Run the harness's command line. Return its exit code."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except GptsmithError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
