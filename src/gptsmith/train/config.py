"""The configuration of a run, in orthogonal parts. Plain data: no torch here, so that `--help` is instant.

config = run_config(steps=500, context=64, model={"hidden_size": 96})      # names as on the command line
config.loop.steps, config.model.hidden_size
config.replace(steps=1000)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from gptsmith.config import from_dict, to_dict
from gptsmith.distributed.layout import AUTO, Layout
from gptsmith.errors import UsageError, nearest
from gptsmith.model.config import LoraConfig, ModelConfig
from gptsmith.model.families import FAMILIES
from gptsmith.optim.schedule import Schedule, learning_rate_factor
from gptsmith.run_directory import PREFIXES
from gptsmith.runtime import Precision

EXACT_PARTS = 8  # that a batch is computed in with --exact, whatever the number of processes
INIT_LR_FACTOR = 0.1  # peak learning rates with --init, relative to training from new weights


@dataclass(frozen=True)
class ModelOptions:
    """The shape of the model; what is left out follows from the family and the width."""

    family: Annotated[str, FAMILIES] = "qwen3"
    """Architecture. gpt1, gpt2, gpt3: as published in 2018, 2019, 2020. qwen3: a current one (RoPE, RMSNorm, SwiGLU,
    grouped-query attention, QK-norm); llama, mistral, qwen2, phi3, olmo2, stablelm, smollm3, gemma3: similar. gpt_neox:
    Pythia. opt: a GPT-3. mixtral, qwen2_moe, qwen3_moe, gpt_oss: mixtures of experts."""
    num_hidden_layers: int = 4
    """Number of blocks."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Number of query heads."""
    num_key_value_heads: int | None = None
    """Number of key/value heads (default: the number of query heads)."""
    head_dim: int | None = None
    """Width of a head (default: hidden size / query heads)."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer (default: 4x for gpt2, about 8/3x for qwen3)."""
    rope_theta: float | None = None
    """Base of the rotary frequencies; longer contexts need a larger one (default: that of the family)."""
    tie_word_embeddings: bool = True
    """Share one matrix between the input embedding and the output head."""
    sliding_window: int | None = None
    """Window of the sliding-window layers of gpt3, mistral, phi3, gemma3 and gpt_oss, in tokens (default: as
    published)."""
    num_experts: int | None = None
    """Number of experts per layer in mixtral, qwen2_moe, qwen3_moe and gpt_oss (default: as published)."""
    num_experts_per_tok: int | None = None
    """Number of experts that each token uses (default: as published)."""
    shared_expert_intermediate_size: int | None = None
    """Width of the shared expert of qwen2_moe (default: the total width of the experts of a token)."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss (default: 0.001)."""
    router_z_loss_coef: float | None = None
    """Weight of the router z-loss (default: 0)."""
    residual_init: Literal["normal", "scaled"] | None = None
    """Initialization of the projections into the residual stream. scaled: smaller, as in GPT-2 (default: that of the
    family)."""

    def __post_init__(self) -> None:
        FAMILIES.find(self.family)

    def build(self, vocab_size: int, context: int) -> ModelConfig:
        """The resolved `ModelConfig`. UsageError where sizes do not fit together."""
        _check(self.num_attention_heads >= 1, "--model.num-attention-heads", self.num_attention_heads, "at least 1")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"--model.hidden-size {self.hidden_size} is not a multiple of "
                f"--model.num-attention-heads {self.num_attention_heads}."
            )
        published = FAMILIES[self.family]()
        options = {key: value for key, value in asdict(self).items() if key != "family"}
        # None: as the family has it. Sizes that follow from others are derived, not taken from the published model.
        derived = {"num_key_value_heads", "head_dim", "intermediate_size"}
        if published.shared_expert_intermediate_size:
            derived.add("shared_expert_intermediate_size")
        options = {key: value for key, value in options.items() if value is not None or key in derived}
        for what, names in _NEEDING.items():  # ignoring an option would be a silent mistake
            given = [f"--model.{name.replace('_', '-')}" for name in names if name in options]
            if given and not getattr(published, what):
                having = ", ".join(name for name, make in FAMILIES.items() if getattr(make(), what))
                raise UsageError(f"{', '.join(given)}: a {self.family} model has none. These have: {having}.")
        return FAMILIES[self.family](vocab_size=vocab_size, max_position_embeddings=context, **options)


_NEEDING = {  # options that are of use to those families only whose published model has the field
    "num_experts": ("num_experts", "num_experts_per_tok", "router_aux_loss_coef", "router_z_loss_coef"),
    "shared_expert_intermediate_size": ("shared_expert_intermediate_size",),
    "window_pattern": ("sliding_window",),
    "rope_theta": ("rope_theta",),
}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "muon"
    """muon: Muon for matrices, AdamW for the rest. adamw: AdamW for everything."""
    lr: float = 0.02
    """Peak learning rate; with muon, that of the matrices."""
    embedding_lr: float = 0.01
    """With muon: peak learning rate of AdamW, for embeddings, head and norms."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and embeddings."""
    momentum: float = 0.9
    """Momentum of Muon."""
    newton_schulz_steps: int = 5
    """Newton-Schulz iterations of Muon; fewer are faster and less exact."""
    beta1: float = 0.9
    """Decay rate of the first moment of AdamW."""
    beta2: float = 0.99
    """Decay rate of the second moment of AdamW."""
    clip: float = 1.0
    """Maximum gradient norm; 0: no clipping."""
    schedule: Schedule = "wsd"
    """Learning rate schedule after the warmup. wsd (warmup-stable-decay): constant, then linear decay."""
    warmup_steps: int = 10
    """Number of steps over which the learning rate rises to its peak."""
    decay_fraction: float = 1.0
    """With wsd: fraction of the steps, at the end, over which the learning rate decays."""
    final_factor: float = 0.0
    """Final learning rate, as a fraction of the peak."""

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr"):
            _check(getattr(self, name) > 0, f"--optim.{name.replace('_', '-')}", getattr(self, name), "above 0")
        for name in ("weight_decay", "clip", "warmup_steps"):
            _check(getattr(self, name) >= 0, f"--optim.{name.replace('_', '-')}", getattr(self, name), "0 or more")
        for name in ("momentum", "beta1", "beta2"):
            _check(0 <= getattr(self, name) < 1, f"--optim.{name}", getattr(self, name), "at least 0 and below 1")
        _check(self.newton_schulz_steps >= 1, "--optim.newton-schulz-steps", self.newton_schulz_steps, "at least 1")
        for name in ("decay_fraction", "final_factor"):
            _check(0 <= getattr(self, name) <= 1, f"--optim.{name.replace('_', '-')}", getattr(self, name), "in [0, 1]")

    def factor(self, step: int, steps: int) -> float:
        """Return the factor of the peak learning rates for step `step` (0-based) of `steps`."""
        return learning_rate_factor(
            step,
            steps=steps,
            kind=self.schedule,
            warmup_steps=self.warmup_steps,
            decay_fraction=self.decay_fraction,
            final_factor=self.final_factor,
        )


@dataclass(frozen=True)
class AutoConfig:
    """Options that leave other options to the rules of `gptsmith.train.budget.recipe`."""

    budget: str | None = None
    """Time (5m, 2h), compute (1e15flop) or tokens (200Mtok) to spend. Options that you do not set (size, context, batch
    size, learning rates, steps) are chosen for the lowest loss within the budget."""
    depth: int | None = None
    """Size of the model as one number: 3 gives 0.6M parameters, 12 gives 85M. Options that you do not set follow from
    it."""


@dataclass(frozen=True)
class DataConfig:
    """The text of a run, besides the data argument itself."""

    val: str | None = None
    """Validation text: a file, folder or named corpus (default: cut from the end of the data)."""
    val_fraction: float = 0.1
    """Fraction of the data, at its end, held out for validation."""
    field: str = "text"
    """Field or column with the text, for rows of JSON, CSV, Parquet and Arrow."""

    def __post_init__(self) -> None:
        _check(0 <= self.val_fraction <= 0.5, "--val-fraction", self.val_fraction, "at least 0 and at most 0.5")


@dataclass(frozen=True)
class InitConfig:
    """What training starts from: a new tokenizer and new weights, or an existing model with its tokenizer."""

    init: str | None = None
    """Continue pretraining this model, with its tokenizer: a run, a model directory, a .gguf file, ORG/NAME on the hub,
    or smollm2-135m (default: start from new weights)."""
    tokenizer: str = "char"
    """char, bpe (trained on the data), gpt2, or the tokenizer of a directory, a file (tokenizer.json), a run or a
    model."""
    vocab_size: int = 4096
    """Vocabulary size of a bpe tokenizer trained on the data."""
    warm_start: bool = True
    """Take over the optimizer's momentum from the checkpoint of --init, if it has one and all weights are trained by
    the same optimizer."""
    unknown: bool = False
    """Add a token for unknown characters to a char tokenizer. With an existing tokenizer: accept text of which more
    than 1% is unknown to it."""

    def __post_init__(self) -> None:
        _check(self.vocab_size >= 1, "--vocab-size", self.vocab_size, "at least 1")


@dataclass(frozen=True)
class LoraOptions(LoraConfig):
    """A low-rank adapter (LoRA), and how the weights are held that it leaves unchanged."""

    quantize: Literal["none", "int8", "int4"] = "none"
    """Hold the unchanged weights in 8 or 4 bits (QLoRA): a quarter to an eighth of their memory."""


@dataclass(frozen=True)
class AdapterConfig(LoraOptions):
    """Whether a run trains an adapter, and which."""

    lora: Literal["auto", "on", "off"] = "auto"
    """Train a low-rank adapter (LoRA) and leave the model's weights unchanged. auto: if another --lora option is set;
    fine-tuning also does it by default, or within a budget as its rules choose."""


@dataclass(frozen=True)
class MethodConfig:
    """Base of the options that belong to one method of training."""

    eval_tokens: int | None = None
    """Number of validation tokens to evaluate on, from the start of the split (default: the whole split)."""

    loop_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 8, "eval_every": 100, "steps": 1000}
    """Options of the loop that differ from pretraining's."""

    muon_factor: ClassVar[float] = INIT_LR_FACTOR
    """Default learning rates of Muon on all weights of a pretrained model, relative to training from new weights."""

    def __post_init__(self) -> None:
        _at_least_one(self, "eval_tokens")

    @property
    def extra_lr(self) -> float | None:
        """The learning rate of models besides the policy; None: the same."""
        return None

    @property
    def masks_documents(self) -> bool:
        """Whether tokens attend only within their own document."""
        return True


@dataclass(frozen=True)
class PretrainConfig(MethodConfig):
    """Pretraining: predict every next token of a text."""

    mask_documents: bool = False
    """Let tokens attend only within their own document."""

    @property
    def masks_documents(self) -> bool:
        return self.mask_documents


@dataclass(frozen=True)
class SftConfig(MethodConfig):
    """Supervised fine-tuning: predict what the assistant says in conversations, or the completions of prompts."""

    epochs: float = 3.0
    """Number of passes over the data, if neither --steps nor --budget is set."""
    train_on: Literal["all", "last"] = "all"
    """Which turns of the assistant are trained on: all of them, or the last of each conversation."""
    packing: bool = True
    """Pack several conversations into a row, each with attention to itself only. Without, every row is one conversation
    and padding."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with rows that cannot be trained on: stop at the first, or leave them out and count them."""
    too_long: Literal["skip", "error"] = "skip"
    """What to do with conversations that are longer than --context: leave them out and count them, or stop."""
    replay: str | None = None
    """Mix in plain text against forgetting, CORPUS:SHARE: wiki-summaries:0.05 makes 5% of the tokens of a batch plain
    text. A file or folder is a corpus, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.epochs > 0, "--epochs", self.epochs, "above 0")
        if self.replay is not None:
            self.replayed()

    def replayed(self) -> tuple[str, float] | None:
        """Return the corpus that is mixed in and its share of the tokens."""
        if self.replay is None:
            return None
        return _corpus_and_number("--replay", self.replay, "SHARE", 1, "wiki-summaries:0.05")


def _corpus_and_number(option: str, text: str, what: str, below: float, example: str) -> tuple[str, float]:
    """Return the parts of CORPUS:NUMBER. Raise UsageError for a number that is not above 0 and below `below`.

    what: the number is.
    """
    corpus, _, number = text.rpartition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not corpus or not 0 < value < below:
        limits = "above 0" if below == math.inf else f"between 0 and {below:g}"
        raise UsageError(f"{option} {text}: write CORPUS:{what} with a {what.lower()} {limits}, such as {example}.")
    return corpus, value


@dataclass(frozen=True)
class PreferenceConfig(MethodConfig):
    """Base of the options of methods that learn from preferences."""

    epochs: float = 1.0
    """Number of passes over the data, if neither --steps nor --budget is set."""
    prompt_form: Literal["auto", "chat", "text"] = "auto"
    """auto: messages are written by the chat template, texts as they are. chat: a text is a message of the user. text:
    a prompt of one message is plain text."""
    score_margins: bool = False
    """Take the difference of two answers' scores as the margin of a pair, where a row has scores and no margin."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with rows that cannot be trained on: stop at the first, or leave them out and count them."""
    too_long: Literal["skip", "error"] = "skip"
    """What to do with answers that, with their prompt, are longer than --context: leave them out and count them, or
    stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.epochs > 0, "--epochs", self.epochs, "above 0")


@dataclass(frozen=True)
class RewardConfig(PreferenceConfig):
    """Reward models: learn from pairs which answers people prefer."""

    # At a tenth of it a small model learns nothing from 2,000 pairs: docs/alignment-benchmarks.md
    muon_factor: ClassVar[float] = 1.0

    centering: float = 0.01
    """Weight of the squared sum of the two scores of a pair, which keeps their mean near 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.centering >= 0, "--centering", self.centering, "0 or more")


@dataclass(frozen=True)
class PromptConfig(MethodConfig):
    """Base of the options of methods that answer prompts."""

    prompt_form: Literal["auto", "chat", "text"] = "auto"
    """auto: messages are written by the chat template, texts as they are. chat: a text is a message of the user. text:
    a prompt of one message is plain text."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with rows without a usable prompt: stop at the first, or leave them out and count them."""
    too_long: Literal["skip", "error"] = "skip"
    """What to do with prompts that leave no room for an answer: leave them out and count them, or stop."""


PreferenceLoss = Literal["sigmoid", "ipo", "hinge", "simpo", "orpo", "kto"]
_DPO_ONLY: Mapping[str, tuple[str, ...]] = {  # options that only some losses have
    "reference": ("sigmoid", "ipo", "hinge", "kto"),
    "label_smoothing": ("sigmoid", "simpo"),
    "target_margin": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


@dataclass(frozen=True)
class DpoConfig(PreferenceConfig):
    """Direct preference optimization: make chosen answers likelier than rejected ones, without a reward model."""

    loss: PreferenceLoss = "sigmoid"
    """sigmoid: DPO as published. ipo: averages over lengths and bounds the margin. hinge: stops at a margin. simpo,
    orpo: without a reference. kto: learns from single answers that are rated good or bad; of a pair, one is each."""
    beta: float | None = None
    """sigmoid, hinge, ipo, kto: how strongly the policy is held to the reference. simpo: scale of the rewards. orpo:
    weight of the odds ratio (default: 0.1; 2 for simpo)."""
    reference: str | None = None
    """The reference: a model with the same vocabulary (default: the model that training starts from)."""
    label_smoothing: float = 0.0
    """With sigmoid (cDPO) and simpo: probability that a preference is the wrong way round."""
    target_margin: float | None = None
    """With simpo: by how much the reward of the chosen answer should exceed the other one's (default: 1)."""
    desirable_weight: float = 1.0
    """With kto: weight of good answers."""
    undesirable_weight: float = 1.0
    """With kto: weight of bad answers."""
    sft_weight: float = 0.0
    """Add the loss of fine-tuning on the chosen answers, in nats per token, times this: it keeps them likely."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.beta is None or self.beta > 0, "--beta", self.beta, "above 0")
        _check(0 <= self.label_smoothing < 0.5, "--label-smoothing", self.label_smoothing, "at least 0 and below 0.5")
        _check(
            self.target_margin is None or self.target_margin >= 0, "--target-margin", self.target_margin, "0 or more"
        )
        for name in ("desirable_weight", "undesirable_weight"):
            _check(getattr(self, name) > 0, f"--{name.replace('_', '-')}", getattr(self, name), "above 0")
        _check(self.sft_weight >= 0, "--sft-weight", self.sft_weight, "0 or more")
        defaults = {option.name: option.default for option in dataclasses.fields(DpoConfig)}
        for name, losses in _DPO_ONLY.items():
            if self.loss not in losses and getattr(self, name) != defaults[name]:
                raise UsageError(f"--{name.replace('_', '-')} has no effect with --loss {self.loss}: leave it out.")
        if self.score_margins:
            raise UsageError(
                "--score-margins is for reward models: these losses know which answer is better, not by how much."
            )

    @property
    def scale(self) -> float:
        """β of the loss."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1

    @property
    def gamma(self) -> float:
        """The target margin of the loss."""
        return self.target_margin if self.target_margin is not None else 1.0


ClassifyTask = Literal["classification", "regression", "entailment", "similarity", "multiple-choice"]


@dataclass(frozen=True)
class ClassifyConfig(MethodConfig):
    """A task head: labels for texts, as in GPT-1."""

    task: ClassifyTask = "classification"
    """classification: a class for a text. regression: a number. entailment: a class for a premise and a hypothesis.
    similarity: a class or a number for two texts without an order. multiple-choice: the right one of some choices."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their scores; other labels are refused (default: those in the data)."""
    aux_loss: float = 0.5
    """Weight of the auxiliary loss of predicting the tokens of the texts; 0: none."""
    epochs: float = 3.0
    """Number of passes over the data, if neither --steps nor --budget is set."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with rows that cannot be trained on: stop at the first, or leave them out and count them."""
    too_long: Literal["truncate", "skip", "error"] = "truncate"
    """What to do with rows that are longer than --context: cut their texts, leave them out and count them, or stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.epochs > 0, "--epochs", self.epochs, "above 0")
        _check(self.aux_loss >= 0, "--aux-loss", self.aux_loss, "0 or more")

    @property
    def masks_documents(self) -> bool:
        return False


@dataclass(frozen=True)
class DistillConfig(SftConfig):
    """Distillation: predict as a teacher does."""

    teacher: str | None = None
    """The teacher: a run, a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m. Its vocabulary begins
    with the student's."""
    on_policy: bool = False
    """Learn from the student's own answers to the prompts of the data, and not from the answers in the data."""
    answer_tokens: int = 128
    """With --on-policy: the longest answer, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "answer_tokens")
        if self.replay is not None:
            raise UsageError("--replay is for fine-tuning; distillation has a teacher for every token.")

    def teacher_model(self) -> str:
        if self.teacher is None:
            raise UsageError("distillation needs a teacher: --teacher MODEL.")
        return self.teacher


@dataclass(frozen=True)
class PolicyConfig(PromptConfig):
    """Learning from rewards for the model's own answers."""

    loop_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 64, "eval_every": 20, "log_every": 1, "steps": 200}

    reward: tuple[str, ...] = ()
    """What scores answers: module:function, file.py:function, the directory of a reward model, or judge:URL. Give it
    several times to add several rewards up."""
    reward_weights: str | None = None
    """Weight of each reward, such as 1,0.2 (default: 1 each)."""
    gold: str | None = None
    """A score to watch but not to train on: evaluations have it, the best checkpoint is that with the highest, and a
    warning tells where the reward rises and it falls."""
    answer_tokens: int = 128
    """Maximum length of an answer, in tokens."""
    stop: tuple[str, ...] = ()
    """An answer ends before this text, besides at the model's end tokens."""
    temperature: float = 1.0
    """Temperature of sampling and of the log-probabilities that are trained."""
    minibatches: int = 1
    """Updates that each rollout is divided into: it has --batch-size times as many answers."""
    passes: int = 1
    """How often each answer is trained on."""
    clip_low: float = 0.2
    """How far below 1 the ratio of new to old probabilities of a token counts."""
    clip_high: float = 0.2
    """How far above 1 it counts."""
    kl: float = 0.0
    """Weight of the KL divergence from the model that training starts from."""
    fast_rollouts: bool = False
    """Sample with the engine's compiled CPU kernels, where they can run the model: faster, but log-probabilities then
    equal the trainer's to a few 1e-5 instead of 1e-5."""
    unended_penalty: float = 0.0
    """Subtracted from the reward of answers that reach --answer-tokens without an end."""
    epochs: float = 1.0
    """Number of passes over the prompts, if neither --steps nor --budget is set."""
    eval_prompts: int = 64
    """Number of held-out prompts that evaluations answer."""
    check_rewards: bool = True
    """Before training, try the reward on empty, copied, repeated and longest answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("answer_tokens", "minibatches", "passes", "eval_prompts"):
            _at_least_one(self, name)
        _check(self.temperature > 0, "--temperature", self.temperature, "above 0")
        _check(0 <= self.clip_low <= 1, "--clip-low", self.clip_low, "at least 0 and at most 1")
        for name in ("clip_high", "kl", "unended_penalty"):
            _check(getattr(self, name) >= 0, f"--{name.replace('_', '-')}", getattr(self, name), "0 or more")
        _check(self.epochs > 0, "--epochs", self.epochs, "above 0")
        self.weights()

    def weights(self) -> list[float]:
        """Return the weight of each reward."""
        if self.reward_weights is None:
            return [1.0] * len(self.reward)
        try:
            weights = [float(part) for part in self.reward_weights.split(",")]
        except ValueError:
            weights = [math.nan]
        if not all(map(math.isfinite, weights)):
            raise UsageError(f"--reward-weights {self.reward_weights}: write numbers with commas, such as 1,0.2.")
        if len(weights) != len(self.reward):
            raise UsageError(f"--reward-weights has {len(weights)} numbers, and there are {len(self.reward)} rewards.")
        return weights

    @property
    def per_prompt(self) -> int:
        """How many answers each prompt gets in a rollout."""
        return 1


GrpoVariant = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"]
GRPO_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"scale": "none", "normalize": "constant", "clip_high": 0.2},  # Liu et al. 2025, 2503.20783
    "dapo": {"scale": "group", "dynamic_sampling": 4, "overlong_buffer": 0.25},  # Yu et al. 2025, 2503.14476
    "gspo": {"loss": "gspo", "scale": "group", "normalize": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},  # MiniMax 2025, 2506.13585
    "rloo": {"baseline": "others", "scale": "none"},  # Ahmadian et al. 2024, 2402.14740
}
"""What the variants set, where the user does not. gspo: Zheng et al. 2025, 2507.18071."""


@dataclass(frozen=True)
class GrpoConfig(PolicyConfig):
    """GRPO: answers are compared with the other answers to the same prompt (Shao et al. 2024, 2402.03300)."""

    variant: GrpoVariant = "grpo"
    """Set the options below as a paper has them, where you do not. dr_grpo: no division by spread or length. dapo:
    dynamic sampling and a penalty for overlong answers. gspo: ratios of whole answers. cispo: clipped weights, no
    clipped gradients. rloo: the baseline leaves the answer itself out."""
    group_size: int = 8
    """Number of answers to each prompt."""
    loss: Literal["clip", "gspo", "cispo"] = "clip"
    """clip: clipped ratios of tokens, as in PPO. gspo: of whole answers. cispo: clipped ratios as constant weights of
    the log-probabilities."""
    baseline: Literal["group", "others"] = "group"
    """What a reward is compared with: the mean of its group, or of the group's other answers."""
    scale: Literal["batch", "group", "none"] = "batch"
    """Divide advantages by the standard deviation of all rewards, by that of the group, or not at all."""
    normalize: Literal["token", "sequence", "constant"] = "token"
    """What the loss is averaged over: all tokens of an update, the tokens of each answer and then the answers, or the
    answers at their maximum length."""
    clip_high: float = 0.28
    """How far above 1 the ratio of new to old probabilities of a token counts."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k2"
    """With --kl: the estimator in the loss. k2 alone has the gradient of the divergence (docs/alignment.md)."""
    dynamic_sampling: int = 0
    """Sample up to so many times again to replace groups whose answers all have the same reward."""
    overlong_buffer: float = 0.0
    """Fraction of --answer-tokens, at its end, over which the reward falls by up to 1."""
    mask_unended: bool = False
    """Leave answers that reach --answer-tokens without an end out of the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise UsageError(
                f"--group-size {self.group_size}: an answer is compared with the others of its group, so it needs 2 or "
                "more. gptsmith ppo learns from single answers."
            )
        _check(self.dynamic_sampling >= 0, "--dynamic-sampling", self.dynamic_sampling, "0 or more")
        _check(0 <= self.overlong_buffer <= 1, "--overlong-buffer", self.overlong_buffer, "at least 0 and at most 1")

    @property
    def per_prompt(self) -> int:
        return self.group_size


@dataclass(frozen=True)
class PpoConfig(PolicyConfig):
    """PPO with a value model and a KL penalty in the reward, as in InstructGPT (Ouyang et al. 2022, 2203.02155)."""

    kl: float = 0.05
    """Weight of the KL divergence from the model that training starts from, subtracted from the rewards token by
    token."""
    kl_target: float | None = None
    """Adapt the weight so that the divergence of an answer becomes this many nats (default: keep the weight)."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """Generalized advantage estimation: 0 trusts the value model, 1 the rewards alone."""
    passes: int = 4
    """How often each answer is trained on."""
    value_clip: float = 0.2
    """How far values may move from those of the rollout before they count no more; 0: without limit."""
    value_coef: float = 0.5
    """Weight of the value model's loss."""
    value_lr: float = 1e-4
    """Peak learning rate of the value model."""
    entropy: float = 0.0
    """Weight of the entropy, which is added to the objective."""
    whiten_rewards: bool = False
    """Divide the rewards of a rollout by their standard deviation."""
    ptx: str | None = None
    """Also train on plain text (PPO-ptx), CORPUS:WEIGHT, such as wiki-summaries:1."""
    ptx_rows: int = 8
    """With --ptx: rows of text per update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "ptx_rows")
        for name in ("gamma", "gae_lambda"):
            _check(0 <= getattr(self, name) <= 1, f"--{name.replace('_', '-')}", getattr(self, name), "in [0, 1]")
        for name in ("value_clip", "value_coef", "entropy"):
            _check(getattr(self, name) >= 0, f"--{name.replace('_', '-')}", getattr(self, name), "0 or more")
        _check(self.value_lr > 0, "--value-lr", self.value_lr, "above 0")
        _check(self.kl_target is None or self.kl_target > 0, "--kl-target", self.kl_target, "above 0")
        self.mixed_text()

    def mixed_text(self) -> tuple[str, float] | None:
        """Return the corpus that is trained on besides and its weight."""
        return (
            None if self.ptx is None else _corpus_and_number("--ptx", self.ptx, "WEIGHT", math.inf, "wiki-summaries:1")
        )

    @property
    def extra_lr(self) -> float:
        return self.value_lr


@dataclass(frozen=True)
class LoopConfig:
    """The training loop: lengths, batches, intervals, device."""

    context: int = 128
    """Sequence length in training, in tokens; for a new model also its maximum context."""
    dropout: float = 0.0
    """Dropout probability."""
    steps: int = 2000
    """Number of optimizer updates."""
    batch_size: int = 16
    """Number of sequences per update."""
    micro_batch_size: int | None = None
    """Number of sequences per forward pass; gradients are accumulated to the batch size (default: the batch size, or
    each process's share of it)."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in the backward pass, which saves memory for about a third more compute. auto: only if the
    run would not fit in memory otherwise."""
    eval_every: int = 500
    """Steps between evaluations on the validation split; a checkpoint is saved before each."""
    save_every: int | None = None
    """Steps between checkpoints (default: that of --eval-every). Besides, the first is saved within a minute, and then
    one at least every ten minutes."""
    keep_checkpoints: int = 2
    """Number of recent checkpoints to keep, besides the best."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; losses are averaged over them."""
    sample_tokens: int = 200
    """Number of tokens of the sample printed at each evaluation; 0: none."""
    sample_prompt: str = "\n"
    """Prompt of the samples."""
    seed: int = 1337
    """Seed of the weights, the data order and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "auto"
    """Number format of the computations. auto: fp32 on a CPU; bf16, or else fp16, on a GPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile. auto: if there is a compiler and the run is long enough to make up for compiling."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "eval_every", "log_every", "keep_checkpoints"):
            _at_least_one(self, name)
        _at_least_one(self, "micro_batch_size")
        _at_least_one(self, "save_every")
        _check(abs(self.seed) < 2**63, "--seed", self.seed, "an integer of 64 bits")
        _check(0 <= self.dropout < 1, "--dropout", self.dropout, "at least 0 and below 1")
        _check(self.sample_tokens >= 0, "--sample-tokens", self.sample_tokens, "0 or more")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise UsageError(f"--micro-batch-size {self.micro_batch_size} must divide --batch-size {self.batch_size}.")


@dataclass(frozen=True)
class EvalConfig:
    """Tasks that are measured during training."""

    tasks: str | None = None
    """Tasks to measure, separated by commas: names from `gptsmith tasks`, or .yaml files."""
    every: int | None = None
    """Steps between measurements; the last step is always measured (default: at each evaluation)."""
    shots: str = "0"
    """How many solved examples a prompt has, separated by commas."""
    limit: int = 200
    """Use only so many examples of each task, from the first."""

    def __post_init__(self) -> None:
        _at_least_one_of(self, "eval", "every")
        _at_least_one_of(self, "eval", "limit")
        _ = self.shot_counts

    @property
    def shot_counts(self) -> tuple[int, ...]:
        try:
            counts = tuple(map(int, self.shots.split(",")))
        except ValueError:
            counts = (-1,)
        _check(min(counts) >= 0, "--eval.shots", self.shots, "numbers, separated by commas, such as 0,4")
        return counts


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes."""

    processes: int = 1
    """Start this many processes on this machine, which share each batch. Under torchrun, its processes are used."""
    parallel: str = "dp"
    """How they share the work. dp: each has a copy of the model. fsdp: the model is divided among them. tp=N: N
    processes share each layer. ep=N: N share the experts of a mixture. Axes multiply: fsdp=8,tp=2. auto: the simplest
    that fits into memory."""
    exact: bool = False
    """Compute the same bits with 1, 2, 4, … processes, by adding up in a fixed order. Slower; with dp alone."""
    process_timeout: float = 120.0
    """Seconds within which each process must answer the others; then the run stops and names it."""

    def __post_init__(self) -> None:
        _at_least_one(self, "processes")
        self.layout(None)
        _check(self.process_timeout > 0, "--process-timeout", self.process_timeout, "above 0")

    def layout(self, processes: int | None) -> Layout | None:
        """Return the layout of so many processes (None: as many as it says); None if it is chosen automatically."""
        return None if self.parallel == AUTO else Layout.parse(self.parallel, processes)


VISION_PARTS = ("text", "tower", "projector")
"""The parts of a model that reads pictures."""


@dataclass(frozen=True)
class PictureConfig:
    """How a model that reads pictures is trained."""

    freeze: tuple[str, ...] = ()
    """Parts that stay as they are: text, tower, projector. Beside an adapter, the tower always does."""
    tower_lr: float = 1.0
    """Learning rates of the vision tower, relative to those of the text model."""
    projector_lr: float | None = None
    """Learning rates of the projector, relative to those of the text model (default: 10, and 1 beside an adapter)."""
    augment: bool = False
    """In fine-tuning, shift and scale pictures at random, and vary the color behind transparent ones."""

    def __post_init__(self) -> None:
        for part in self.freeze:
            if part not in VISION_PARTS:
                known = ", ".join(VISION_PARTS)
                raise UsageError(
                    f"--vision.freeze: unknown part {part!r}.{nearest(part, VISION_PARTS)} Parts: {known}."
                )
        for name in ("tower_lr", "projector_lr"):
            value = getattr(self, name)
            _check(value is None or 0 < value < math.inf, f"--vision.{name.replace('_', '-')}", value, "above 0")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: the same values and the same data give the same weights.

    Each part is independent of the others; `method` belongs to the objective. On the command line the options of
    `model`, `adapter`, `optim`, `eval` and `vision` have a prefix (`--model.hidden-size`, `--lora.rank`), all others
    stand alone (`--steps`, `--lora`): a *flat name* is the same with underscores (`model.hidden_size`, `steps`).
    """

    auto: AutoConfig = field(default_factory=AutoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    init: InitConfig = field(default_factory=InitConfig)
    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    method: MethodConfig = field(default_factory=PretrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    vision: PictureConfig = field(default_factory=PictureConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def replace(self, **options: Any) -> RunConfig:
        """Return this configuration with other values, by flat name; `model` and `optim` take mappings or whole parts.

        Raises UsageError for an unknown name (with the nearest one) or a value of the wrong type.
        """
        return with_options(self, options)

    def check_processes(self, *, planned: bool = False) -> None:
        """Raise UsageError where the processes cannot share the run. planned: a budget or depth has been applied."""
        processes, batch_size = self.parallel.processes, self.loop.batch_size
        layout = self.parallel.layout(processes)
        if layout is not None and layout.divides_model:
            parallel = f"--parallel {self.parallel.parallel}"
            if isinstance(self.method, PolicyConfig):
                raise UsageError(f"{parallel}: this method samples answers, so each process needs the whole model: dp.")
            if self.loop.compile == "on":
                raise UsageError(f"--compile on with {parallel}: a divided model is not compiled.")
            if self.parallel.exact:
                raise UsageError(f"--exact with {parallel}: only dp adds up in a fixed order.")
            if self.adapter.lora == "on" and (layout.tp > 1 or layout.ep > 1):
                raise UsageError(f"{parallel}: adapters cannot be divided by tp or ep. Use fsdp, dp, or --lora off.")
        if self.parallel.exact and (processes & (processes - 1) or batch_size % EXACT_PARTS or EXACT_PARTS % processes):
            raise UsageError(
                f"--exact with {processes} processes and batches of {batch_size}: use 1, 2, 4 or {EXACT_PARTS} "
                f"processes and a --batch-size that is a multiple of {EXACT_PARTS}."
            )
        if processes == 1:
            return
        will_be_planned = not planned and (self.auto.budget is not None or self.auto.depth is not None)
        shares = processes if layout is None else layout.data_size
        if batch_size % shares and not will_be_planned:
            raise UsageError(
                f"{shares} processes cannot share batches of {batch_size}: set a --batch-size that is a multiple of "
                f"{shares}, or other --processes."
            )

    def flat(self) -> dict[str, Any]:
        """All options by flat name."""
        places = option_places(type(self.method))
        return {name: getattr(getattr(self, part), key) for name, (part, key) in places.items()}

    def as_options(self) -> dict[str, Any]:
        """Return plain data as the command line has it: `{"steps": …, "model": {…}, "optim": {…}}`."""
        options: dict[str, Any] = {}
        for name, part in to_dict(self).items():
            options.update({PREFIXES[name]: part} if name in PREFIXES else part)
        return options


def option_places(method: type[MethodConfig] = PretrainConfig) -> dict[str, tuple[str, str]]:
    """flat name -> (part, field), in the order of the command line, for runs of a method."""
    places = {}
    for part in dataclasses.fields(RunConfig):
        make: Any = method if part.name == "method" else part.default_factory
        for option in dataclasses.fields(make):
            prefix = PREFIXES.get(part.name)
            flat = option.name if prefix in (None, option.name) else f"{prefix}.{option.name}"  # `lora` stands alone
            places[flat] = (part.name, option.name)
    return places


def default_config(method: type[MethodConfig] = PretrainConfig) -> RunConfig:
    """Return the configuration of a run of a method, before any option is set."""
    if method is PretrainConfig:
        return RunConfig()
    return RunConfig(method=method(), loop=LoopConfig(**method.loop_defaults))


def run_config(**options: Any) -> RunConfig:
    """Build a configuration from options by flat name; see `RunConfig.replace`."""
    return with_options(RunConfig(), options)


def with_options(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """Return `config` with `options` by flat name (`{"steps": 10, "model.hidden_size": 64}`), values checked.

    Also takes whole parts, nested (`{"loop": {"steps": 10}}`). Raises UsageError as `RunConfig.replace` does.
    """
    places = option_places(type(config.method))
    parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(RunConfig)}
    by_prefix = {prefix: part for part, prefix in PREFIXES.items()}
    changes: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            name = by_prefix.get(name, name)
        if name in places and not isinstance(value, Mapping | InitConfig | ParallelConfig):  # options and parts
            part, key = places[name]
            changes.setdefault(part, {})[key] = value
        elif name in parts and isinstance(value, type(parts[name])):
            changes.setdefault(name, {}).update(
                {option.name: getattr(value, option.name) for option in dataclasses.fields(value)}
            )
        elif name in parts and isinstance(value, Mapping):
            changes.setdefault(name, {}).update(value)
        else:
            raise UsageError(f"unknown option {name!r}.{nearest(name, [*places, *parts])}")
    updated = {
        part: from_dict(type(parts[part]), values, default=parts[part], where=PREFIXES.get(part, ""))
        for part, values in changes.items()
    }
    return dataclasses.replace(config, **updated)


def is_flat(values: Mapping[str, Any]) -> bool:
    """Whether a mapping of options is of the flat form that run.json and --config files had before schema 2."""
    parts = {part.name for part in dataclasses.fields(RunConfig)}
    return any(name not in parts for name in values)


def options_of(values: Mapping[str, Any], method: type[MethodConfig] = PretrainConfig) -> set[str]:
    """The flat names of the options that a mapping for `with_options` sets."""
    places = option_places(method)
    by_prefix = {prefix: part for part, prefix in PREFIXES.items()}
    names: set[str] = set()
    for name, value in values.items():
        if isinstance(value, Mapping):
            name = by_prefix.get(name, name)
        if name in places and not isinstance(value, Mapping | InitConfig | ParallelConfig):
            names.add(name)
        elif isinstance(value, Mapping) or dataclasses.is_dataclass(value):
            keys: Collection[str] = value if isinstance(value, Mapping) else to_dict(value)
            names |= {flat for flat, place in places.items() if place[0] == name and place[1] in keys}
    return names


def _at_least_one(config: Any, name: str) -> None:
    value = getattr(config, name)
    _check(value is None or value >= 1, f"--{name.replace('_', '-')}", value, "at least 1")


def _at_least_one_of(config: Any, prefix: str, name: str) -> None:
    value = getattr(config, name)
    _check(value is None or value >= 1, f"--{prefix}.{name}", value, "at least 1")


def _check(ok: bool, option: str, value: Any, expected: str) -> None:
    if not ok or (isinstance(value, float) and not math.isfinite(value)):
        raise UsageError(f"{option} must be {expected}, not {value}.")
