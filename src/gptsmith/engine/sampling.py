"""Sampling options: how to choose tokens, and how many. The one place for their types, defaults, ranges and help texts.

- `SamplingOptions`: the basic options, which every interface has.
- `GenerationOptions`: those, and all others that `gptsmith generate` has.
- `SamplingParams`: those, and what only programs set: what the engine takes, validated.

A command uses a dataclass as it is, with its own defaults. tyro makes a flag of each field:

    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = field(default=SamplingOptions(temperature=0.7))
    ...
    params = SamplingParams.from_options(chosen.sampling, overflow="truncate")

A schema looks up its fields by name. `request_range` is the range for requests over HTTP, `limits` names its bounds as
pydantic does, and fields that a request leaves out are left out of `SamplingParams`, too:

    def sampling_field(name: str) -> Any:
        option = SAMPLING_OPTIONS[name]
        return Field(None, description=option.help, **option.request_range.limits())

    top_p: float | None = sampling_field("top_p")

This module does not import torch, so that `--help` answers at once.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

from gptsmith.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
INT32_MAX = 2**31 - 1
GREEDY_BELOW = 1e-5
"""Temperatures below this count as 0, as in vLLM: dividing by them overflows, and they choose the same token anyway."""


@dataclass(frozen=True)
class Range:
    """The numbers that are at least `ge`, above `gt` and at most `le`. None: no such bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        def text(bound: float) -> str:
            return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"

        low = f"above {text(self.gt)}" if self.gt is not None else ""
        low = f"at least {text(self.ge)}" if self.ge is not None else low
        high = f"at most {text(self.le)}" if self.le is not None else ""
        return " and ".join(filter(None, (low, high))) or "a number"

    def limits(self) -> dict[str, float]:
        """Return the bounds that exist, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Option(NamedTuple):
    """A sampling option. range: of values that the engine accepts. request_range: that an HTTP request may ask for."""

    help: str
    range: Range
    request_range: Range


def option(default: T, help: str, range: Range | None = None, *, request_range: Range | None = None) -> T:
    """Return a dataclass field that knows its `Option`. request_range: `range` if not given."""
    described = Option(help, range or Range(), request_range or range or Range())
    declared: Any = field(default=default, metadata={"help": help, "option": described})
    return declared  # type: ignore[no-any-return]


class ConstraintState(Protocol):
    """The state of one text in a grammar."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing can follow."""

    def allowed(self) -> Tensor:
        """Return the tokens that can come next: (V,) bool."""

    def push(self, token: int) -> None:
        """Advance by a token."""

    def copy(self) -> ConstraintState:
        """Return an independent copy."""


class Constraint(Protocol):
    """A language that generated text must be in; see `engine.grammar`."""

    def start(self) -> ConstraintState:
        """Return the state of an empty text. Raise UsageError if no text satisfies the constraint."""


class StopMatcher(Protocol):
    """Follows one text as it is generated."""

    def push(self, token: int) -> bool:
        """Read the next token; return whether the text ends with it."""

    def copy(self) -> StopMatcher:
        """Return an independent copy."""


class StopCondition(Protocol):
    """Ends texts where more than a single token decides, as with stop strings."""

    def start(self) -> StopMatcher:
        """Return a matcher for a new text."""


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen: the options that every interface has."""

    max_tokens: int = option(
        200, "Maximum number of tokens to generate.", Range(ge=1), request_range=Range(ge=1, le=INT32_MAX)
    )
    temperature: float = option(
        0.8,
        "Divides the logits: below 1 safer, above 1 more varied. 0 always takes the most probable token.",
        Range(ge=0),
        request_range=Range(ge=0, le=2),
    )
    top_k: int | None = option(
        None,
        "Sample from the k most probable tokens only.",
        Range(ge=1),
        request_range=Range(ge=-1, le=INT32_MAX),
    )
    top_p: float | None = option(  # Holtzman et al. 2019, 1904.09751
        None,
        "Sample from the fewest tokens whose probabilities sum to at least p.",
        Range(gt=0, le=1),
        request_range=Range(ge=0, le=1),
    )
    min_p: float | None = option(  # Nguyen et al. 2024, 2407.01082
        None,
        "Drop tokens less probable than this fraction of the most probable token's probability.",
        Range(ge=0, le=1),
    )
    repetition_penalty: float = option(  # Keskar et al. 2019, 1909.05858
        1.0,
        "Above 1: make tokens less likely that occurred before, in the prompt or the answer.",
        Range(gt=0),
        request_range=Range(gt=0, le=100),
    )
    seed: int | None = option(
        None,
        "Seed of the random numbers; the same seed gives the same text. Sample i of several uses seed + i "
        "(default: a new seed each time).",
        Range(ge=-(2**63), le=2**63 - 1),
    )


@dataclass(frozen=True)
class GenerationOptions(SamplingOptions):
    """How tokens are chosen."""

    min_tokens: int = option(
        0,
        "Ignore stop tokens and stop strings before this many tokens.",
        Range(ge=0),
        request_range=Range(ge=0, le=INT32_MAX),
    )
    typical_p: float | None = option(  # Meister et al. 2022, 2202.00666
        None,
        "Sample from the tokens whose information is closest to the expected one and whose probabilities sum to p.",
        Range(gt=0, le=1),
    )
    presence_penalty: float = option(  # as in OpenAI's API, like the next
        0.0,
        "Subtracted from the logit of every token that was generated before.",
        Range(ge=-100, le=100),
        request_range=Range(ge=-2, le=2),
    )
    frequency_penalty: float = option(
        0.0,
        "Subtracted from a token's logit once per earlier occurrence in the generated text.",
        Range(ge=-100, le=100),
        request_range=Range(ge=-2, le=2),
    )
    stop: tuple[str, ...] = option((), "Stop before this text.")
    ignore_eos: bool = option(False, "Continue past the model's end tokens.")
    best_of: int | None = option(
        None,
        "Generate this many continuations and keep those with the highest mean log-probability.",
        Range(ge=1, le=INT32_MAX),
        request_range=Range(ge=1, le=128),
    )
    beams: int = option(
        1,
        "Above 1: beam search with this many beams; needs temperature 0.",
        Range(ge=1, le=INT32_MAX),
        request_range=Range(ge=1, le=32),
    )


@dataclass(frozen=True)
class SamplingParams(GenerationOptions):
    """What the engine takes: all options, validated. Raise UsageError for values out of range or that contradict each
    other.

    The engine deals in token ids: `stop` is for `engine.text`, which finds stop strings; the engine itself refuses it.
    """

    n: int = option(1, "Number of continuations.", Range(ge=1, le=INT32_MAX), request_range=Range(ge=1, le=128))
    logit_bias: Mapping[int, float] = field(
        default_factory=dict,
        metadata={
            "option": Option("Added to the logits of these tokens, by token id.", Range(), Range(ge=-100, le=100)),
        },
    )
    """-inf forbids a token."""
    constraint: Constraint | None = None
    """A grammar that the generated tokens follow; see `engine.grammar`."""
    stop_ids: tuple[int, ...] = option((), "Tokens at which to stop.")
    stop_condition: StopCondition | None = None
    """A further condition at which to stop: stop strings, where `engine.text` sees a text only once it has ended."""
    length_penalty: float = option(
        1.0,
        "Beam search compares log-probabilities divided by length to this power.",
        request_range=Range(ge=-10, le=10),
    )
    early_stopping: bool = option(
        False,
        "End beam search with the first `beams` finished texts, rather than when no unfinished beam is likely to score "
        "higher.",
    )
    logprobs: int | None = option(
        None,
        "Return the log-probability of each generated token and of this many of the most probable ones.",
        Range(ge=0),
        request_range=Range(ge=0, le=20),
    )
    sampled_logprobs: bool = option(
        False,
        "Return log-probabilities of the distribution that the tokens are drawn from: after penalties, temperature and "
        "filters.",
    )
    prompt_logprobs: int | None = option(
        None, "Return the model's log-probability of each token of the prompt, and this many others.", Range(ge=0)
    )
    echo: bool = option(False, "Begin the result with the prompt.")
    prompt_only: bool = option(False, "Compute the prompt, for its log-probabilities, and generate no token.")
    cache_prompt: bool = option(
        True, "Share the cached keys and values of the prompt with other requests that begin with the same tokens."
    )
    overflow: Literal["error", "truncate", "shift"] = option(
        "error",
        "What to do beyond the context. error: refuse a prompt that does not fit, and stop when the context is full. "
        "truncate: cut off the beginning of the prompt so that max_tokens fit (but keep a quarter of the context), and "
        "stop when the context is full. shift: when the context is full, forget the oldest quarter and continue.",
    )
    adapter: str | None = option(None, "Name of the LoRA adapter to use. None: the base model.")

    @classmethod
    def from_options(cls, options: SamplingOptions, **more: Any) -> SamplingParams:
        """Return the parameters for these options; `more` sets or overrides fields. Raise UsageError for bad values."""
        return cls(**vars(options) | more)

    def __post_init__(self) -> None:
        for name, kind, optional, range in _NUMBERS:
            value = getattr(self, name)
            if value is None and optional:
                continue
            if not _all_are(kind, (value,)):
                self._reject(name, "an integer" if kind is numbers.Integral else "a number")
            if isinstance(value, float) and not math.isfinite(value):
                self._reject(name, "a finite number")
            if value not in range:
                self._reject(name, str(range))
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        self._check_collections()
        if self.min_tokens > self.max_tokens:
            self._reject("min_tokens", f"at most max_tokens ({self.max_tokens})")
        if self.best_of is not None and self.best_of < self.n:
            self._reject("best_of", f"at least n ({self.n})")
        if self.overflow not in ("error", "truncate", "shift"):
            self._reject("overflow", "error, truncate or shift")
        if self.beams > 1:
            if self.temperature != 0:
                self._reject("temperature", "0 with beam search, which does not sample")
            if self.n > self.beams:
                self._reject("n", f"at most the number of beams ({self.beams})")
            if self.best_of is not None:
                self._reject("best_of", "left out with beam search")
            if self.constraint is not None:
                self._reject("constraint", "left out with beam search")
        if self.sampled_logprobs and self.temperature == 0:
            self._reject("sampled_logprobs", "left out at temperature 0, which does not sample")
        if self.beams == 1 and self.temperature == 0 and (self.best_of or 1) > 1:
            self._reject("best_of", "left out at temperature 0, where all samples are the same")

    def _check_collections(self) -> None:
        if not _all_are(numbers.Integral, self.stop_ids):
            self._reject("stop_ids", "token ids")
        if not _all_are(numbers.Integral, self.logit_bias) or not _all_are(numbers.Real, self.logit_bias.values()):
            self._reject("logit_bias", "a mapping from token ids to numbers")
        if any(math.isnan(bias) or bias == math.inf for bias in self.logit_bias.values()):
            self._reject("logit_bias", "numbers below infinity")
        if _all_are(str, (self.stop,)) or not _all_are(str, self.stop) or not all(self.stop):
            self._reject("stop", "a tuple of non-empty strings")

    def _reject(self, name: str, expected: str) -> None:
        raise UsageError(f"--{name.replace('_', '-')} must be {expected}, not {getattr(self, name)}.")

    @property
    def samples(self) -> int:
        """The number of sequences to sample."""
        return self.best_of or self.n

    @property
    def returns_only_at_end(self) -> bool:
        """Whether which texts are returned is known only when all have ended: nothing can be streamed before."""
        return self.beams > 1 or self.samples > self.n

    @property
    def uses_raw_logits(self) -> bool:
        """Whether tokens depend on the logits alone: no penalty, bias, grammar, minimum length or beam search."""
        return not (
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.constraint is not None
            or self.min_tokens
            or self.beams > 1
        )


_MODEL_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
# Keys of generation_config.json that do not change which tokens are chosen, or that are handled elsewhere.
_WITHOUT_EFFECT = {
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "do_sample",
        "max_length",
        "min_length",
    ),
    *(
        "max_new_tokens",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "return_legacy_cache",
        "num_return_sequences",
    ),
    *("transformers_version", "trust_remote_code", "return_dict_in_generate", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states", "early_stopping", "length_penalty", "remove_invalid_values"),
    *("disable_compile", "compile_config", "low_memory", "chat_format"),
}
_NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, 1.0, [], {}, "")


class ModelDefaults(NamedTuple):
    """The sampling options that a model came with.

    options: fields of `SamplingOptions` and `GenerationOptions`. unused: settings that change which tokens are chosen
    and that this engine does not have.
    """

    options: dict[str, Any]
    unused: dict[str, Any]

    def describe(self, own: SamplingOptions, chosen: SamplingOptions | None = None) -> str | None:
        """Return a sentence for the user about what differs from the `own` defaults; None if nothing does.

        chosen: the options in use; those that differ from the model's are not mentioned.
        """
        options = {
            name: value
            for name, value in self.options.items()
            if getattr(own, name, None) != value and getattr(chosen, name, value) == value
        }
        parts = ["the model's own sampling options: " + _listed(options)] if options else []
        if self.unused:
            parts.append("options of the model that are not supported: " + _listed(self.unused))
        return "; ".join(parts) + "." if parts else None


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def model_defaults(generation_config: Mapping[str, Any]) -> ModelDefaults:
    """Return the sampling options in a model's generation_config.json. Values that switch an option off are left out.

    `do_sample: false` means temperature 0. Raise UsageError for a value out of range.
    """
    options: dict[str, Any] = {}
    for name in _MODEL_DEFAULTS:
        value = generation_config.get(name)
        if value is None or (name == "top_k" and value == 0) or (name not in ("temperature", "top_k") and value == 1):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value not in SAMPLING_OPTIONS[name].range or (name == "top_k" and type(value) is not int):
            raise UsageError(f"the model's generation_config.json has {name} = {value!r}, which is not valid.")
        options[name] = value
    if generation_config.get("do_sample") is False:
        options = {name: value for name, value in options.items() if name == "repetition_penalty"} | {
            "temperature": 0.0
        }
    unused = {
        name: value
        for name, value in generation_config.items()
        if name not in _MODEL_DEFAULTS
        and name not in _WITHOUT_EFFECT
        and not name.startswith("_")
        and (value is True or value not in _NEUTRAL)
    }
    return ModelDefaults(options, unused)


SAMPLING_OPTIONS: dict[str, Option] = {
    each.name: each.metadata["option"] for each in fields(SamplingParams) if "option" in each.metadata
}
"""All options by name."""


class _Number(NamedTuple):
    """An option that is a number."""

    name: str
    kind: type
    optional: bool
    range: Range


def _number_options() -> Iterator[_Number]:
    kinds = {"int": numbers.Integral, "float": numbers.Real}
    for each in fields(SamplingParams):
        kind, _, none = str(each.type).partition(" | ")  # annotations are strings here: "int", "float | None"
        if kind in kinds:
            yield _Number(each.name, kinds[kind], none == "None", SAMPLING_OPTIONS[each.name].range)


_NUMBERS = list(_number_options())


def _all_are(kind: type, values: Iterable[object]) -> bool:
    """Return whether all values are of this kind. A bool is not a number here."""
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
