"""Models with a task head as Hugging Face directories: `...ForSequenceClassification` of each layout."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf import (
    CONFIG_FILE,
    LAYOUTS,
    WEIGHTS_FILE,
    config_to_hf,
    read_config_file,
    select_tensors,
    weight_views,
    write_json,
)
from gptsmith.formats.hf_weights import HEAD
from gptsmith.formats.safetensors_writer import write_tensors
from gptsmith.formats.source import open_model
from gptsmith.model.heads import HeadConfig, Problem, SequenceClassifier
from gptsmith.storage import atomic_file

SCORE = "score.weight"
"""The name of the head's matrix in every layout."""

# Keys of config.json that transformers does not know, and keeps. It has no multiple choice for these models.
_PROBLEM, _TASK = "gptsmith_problem", "gptsmith_task"
_REWARD = "gptsmith_reward"  # mean and standard deviation of a reward model's scores


def save_classifier(
    classifier: SequenceClassifier,
    directory: Path,
    *,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    end_ids: Sequence[int] = (),
    scale: tuple[float, float] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors` into an existing directory, as transformers reads them.

    pad_token_id: transformers scores the rightmost token that is not this one, and needs it for several texts at once.
    scale: of a reward model, mean and standard deviation of its scores; see `reward_scale`.
    The output matrix of the language model is not saved.
    """
    model, head = classifier.transformer, classifier.head
    config = config_to_hf(model.config, bos_token_id=bos_token_id, end_ids=end_ids)
    name = re.sub(r"(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", config["architectures"][0])
    config |= {
        "architectures": [name],
        "id2label": {str(i): label for i, label in enumerate(head.labels)},
        "label2id": {label: i for i, label in enumerate(head.labels)},
        "pad_token_id": pad_token_id,
    }
    if head.task:
        config[_TASK] = head.task
    if head.problem == "multiple_choice":
        config[_PROBLEM] = head.problem
    else:
        config["problem_type"] = head.problem
    if scale is not None:
        config[_REWARD] = dict(zip(("mean", "std"), scale, strict=True))
    head_name = LAYOUTS[model.config.model_type].head
    weights = {key: tensor for key, tensor in weight_views(model).items() if key != head_name}
    weights[SCORE] = classifier.score.weight.detach()
    write_json(Path(directory) / CONFIG_FILE, config)
    with atomic_file(Path(directory) / WEIGHTS_FILE) as file:
        write_tensors(file, weights)


def load_classifier(directory: Path) -> tuple[SequenceClassifier, int | None]:
    """Return the model with the head in a `...ForSequenceClassification` directory, in eval mode, and its padding id.

    Its language model has no output matrix of its own: it is tied to the embeddings.
    Raises CheckpointError for a directory that has no head, or one that does not fit its config.json.
    """
    source = open_model(directory)
    if SCORE not in source.tensors:
        raise CheckpointError(f"{directory} has no tensor {SCORE}: it is not a model for sequence classification.")
    score = source.tensors[SCORE].float()
    head_name = LAYOUTS[source.config.model_type].head
    others = select_tensors(source.tensors, lambda name: name not in (SCORE, HEAD, head_name))
    source = replace(source, config=replace(source.config, tie_word_embeddings=True), tensors=others)
    head = _head_config(source.hf_config, str(Path(directory) / CONFIG_FILE), score)
    classifier = SequenceClassifier(source.model(), head)
    if score.shape != classifier.score.weight.shape:
        raise CheckpointError(
            f"{directory}: {SCORE} is {list(score.shape)}, expected {list(classifier.score.weight.shape)}."
        )
    with torch.no_grad():
        classifier.score.weight.copy_(score)
    return classifier.eval(), source.hf_config.get("pad_token_id")


def reward_scale(directory: Path) -> tuple[float, float] | None:
    """Return mean and standard deviation of a reward model's scores, by which they are normalized; None without them.

    Raises CheckpointError where config.json has them, but not as two numbers, the second above 0.
    """
    found = read_config_file(directory).get(_REWARD)
    if found is None:
        return None
    try:
        mean, std = float(found["mean"]), float(found["std"])
    except (TypeError, ValueError, KeyError):
        mean = std = math.nan
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise CheckpointError(
            f'{Path(directory) / CONFIG_FILE}: {_REWARD} must be {{"mean": …, "std": …}}, std above 0.'
        )
    return mean, std


def _head_config(values: Mapping[str, Any], where: str, score: torch.Tensor) -> HeadConfig:
    count = len(score) if score.ndim else 0
    names = values.get("id2label")
    if names is None:
        names = {i: f"LABEL_{i}" for i in range(count)}
    try:
        labels = [str(names[key]) for key in sorted(names, key=int)]
        if [int(key) for key in sorted(names, key=int)] != list(range(count)):
            raise CheckpointError(f"{where}: id2label has {len(labels)} labels, but {SCORE} has {count} rows.")
    except (TypeError, ValueError, AttributeError, KeyError):
        raise CheckpointError(f"{where}: id2label is not an object of numbers and names.") from None
    known: dict[Any, Problem] = {
        "single_label_classification": "single_label_classification",
        "multi_label_classification": "multi_label_classification",
        "regression": "regression",
        "multiple_choice": "multiple_choice",
        None: "regression" if count == 1 else "single_label_classification",  # as transformers decides for int targets
    }
    problem = values.get(_PROBLEM) or values.get("problem_type")
    if problem not in known:
        raise CheckpointError(f"{where}: unknown problem_type {problem!r}.")
    return HeadConfig(tuple(labels), known[problem], str(values.get(_TASK) or ""))
