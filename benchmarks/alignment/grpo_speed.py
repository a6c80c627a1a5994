"""How fast is GRPO from end to end (rollout, reward, update), compared with TRL's GRPOTrainer?

    python benchmarks/alignment/grpo_speed.py                # writes benchmarks/results/grpo_speed.json

Both train all weights of the same small random Llama by AdamW on the same prompts, eight answers to each, with the same
reward function, without a KL term, evaluations and checkpoints. Seconds are those of the processor, with one thread,
since the machine may be shared. A random model nearly
never ends an answer, so that all answers have the same length. The repeats alternate; the ratio is that of the medians
of answers per second over the updates of a run but the first. TRL has no PPO any more: ours, with one pass over its
answers, is compared with TRL's GRPO. "fast": with --fast-rollouts.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import gptsmith

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from against_trl import OURS, make_model, text, trl_settings

from gptsmith.train.callbacks import Callback

GROUP = 8


def vowels(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
    """Return the share of vowels in each answer."""
    return [sum(letter in "aeiou" for letter in each) / max(1, len(each)) for each in completions]


def ours(name: str, model: Path, data: Path, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return answers per second, the seconds of a rollout, and the mean length of the last answers."""
    rollouts: list[float] = []
    policy: Any = importlib.import_module("gptsmith.train.objectives.policy")
    sample = policy.sample_answers

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.process_time()
        answers = sample(*arguments, **named)
        rollouts.append(time.process_time() - began)
        return answers

    ends: list[float] = []

    class Clock(Callback):
        def on_log(self, run: Any, row: Any) -> None:
            ends.append(time.process_time())

    policy.sample_answers = timed
    method = name.split()[0]
    try:
        run = getattr(gptsmith, method)(
            model,
            data,
            reward=vowels,
            out=out,
            steps=options.steps,
            batch_size=options.batch,
            answer_tokens=options.tokens,
            context=64 + options.tokens,
            check_rewards=False,
            eval_every=options.steps,
            fast_rollouts="fast" in name,
            passes=1,
            callbacks=[Clock()],
            **OURS,
            **({"group_size": GROUP} if method == "grpo" else {}),
        )
    finally:
        policy.sample_answers = sample
    rows = [row for row in run.metrics if "loss" in row]
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    return {
        "answers per second": options.batch / statistics.mean(seconds),
        "rollout seconds": statistics.median(rollouts),
        "length": next(row["length"] for row in reversed(rows) if "length" in row),
    }


def theirs(model: Path, rows: list[dict[str, str]], out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the same of TRL."""
    import datasets
    import transformers
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    lengths: list[float] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        lengths.append(statistics.mean(map(len, completion_ids)))
        return [*vowels([], completions)]

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=GRPOConfig(
            **trl_settings(out, options.steps, options.batch),
            num_generations=GROUP,
            max_completion_length=options.tokens,
            beta=0.0,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    return {"answers per second": options.batch / statistics.mean(seconds), "length": lengths[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64, help="answers in an update")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=300)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {"grpo": [], "grpo fast": [], "ppo": [], "trl grpo": []}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = make_model(place / "model", options.width, options.layers, vocabulary=options.vocabulary, context=256)
        rng = random.Random(0)
        rows = [{"prompt": f"{text(rng, rng.randint(4, 12))}?"} for _ in range(options.batch * options.steps)]
        data = place / "prompts.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        for repeat in range(options.repeats):
            for name in ("grpo", "grpo fast", "ppo"):
                found[name].append(ours(name, model, data, place / f"{name}-{repeat}", options))
            found["trl grpo"].append(theirs(model, rows, place / f"trl-{repeat}", options))
            print({name: {k: round(v, 3) for k, v in values[-1].items()} for name, values in found.items()}, flush=True)
    medians = {name: statistics.median(v["answers per second"] for v in values) for name, values in found.items()}
    result: dict[str, Any] = {
        "options": vars(options),
        "runs": found,
        "medians": medians,
        "ratio": medians["grpo"] / medians["trl grpo"],
        "ratio fast": medians["grpo fast"] / medians["trl grpo"],
    }
    print(medians, f"ratio {result['ratio']:.2f}, with fast rollouts {result['ratio fast']:.2f}")
    if not options.no_save:
        from machine import save

        print(save("grpo_speed", result))


if __name__ == "__main__":
    main()
