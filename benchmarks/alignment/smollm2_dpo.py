"""DPO on a real chat model: python benchmarks/alignment/smollm2_dpo.py [--seeds 3] [--steps 24] [--save]

smollm2-135m learns the preferences of dpo_en_demo by LoRA: loss and accuracy on held-out pairs and bits per byte of
plain text, before and after. The last run is exported and read by transformers, which has to continue a prompt with
the same ids, greedily, and it is served and asked through the openai client. Seeds share the held-out pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tuning"))

import common
from smollm2 import ANSWER_TOKENS, QUESTION, ask_server, greedy

import gptsmith


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return what an evaluation has found."""
    names = ("val_loss", "val_accuracy", "text_bits_per_byte")
    return {name: round(row[name], 4) for name in names if name in row}


def split(place: Path, held_out: int) -> tuple[Path, Path]:
    """Write the pairs to learn from and those held out, which are the same for every seed."""
    from gptsmith.data.corpora import corpus_path

    source = corpus_path("dpo_en_demo")
    rows = json.loads(source.read_text()) if source.suffix == ".json" else None
    if rows is None:
        rows = [json.loads(line) for line in source.read_text().split("\n") if line]
    files = []
    for name, part in (("train", rows[held_out:]), ("held-out", rows[:held_out])):
        files.append(place / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in part))
    return files[0], files[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=40, help="pairs")
    parser.add_argument("--work", type=Path, default=common.MODELS / "smollm2-dpo", help="where models are kept")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/smollm2_dpo.json")
    options = parser.parse_args()
    import machine
    import transformers

    from gptsmith.engine.engine import Engine
    from gptsmith.engine.sampling import SamplingParams
    from gptsmith.export.export import export_directory
    from gptsmith.tokenizer.chat import ChatTemplate

    options.work.mkdir(parents=True, exist_ok=True)
    base = options.work / "base"
    if not base.exists():
        export_directory("smollm2-135m", base, dtype="fp32")
    data, held_out = split(options.work, options.held_out)
    runs = []
    for seed in range(options.seeds):
        began = time.monotonic()
        run = gptsmith.dpo(
            base,
            data,
            val=str(held_out),
            out=options.work / f"run-{seed}-{int(time.time())}",
            steps=options.steps,
            batch_size=options.batch_size,
            context=options.context,
            too_long="skip",
            eval_every=options.steps,
            sample_tokens=0,
            compile="off",
            seed=seed,
        )
        evaluations = [row for row in run.metrics if "val_loss" in row]
        runs.append(
            {
                "seed": seed,
                "before": numbers(evaluations[0]),
                "after": numbers(evaluations[-1]),
                "seconds": round(time.monotonic() - began),
            }
        )
        print(json.dumps(runs[-1]), flush=True)
    model, tokenizer = gptsmith.load(run)
    prompt = ChatTemplate(tokenizer).encode([{"role": "user", "content": QUESTION}])
    end = set(tokenizer.end_ids)
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, stop_ids=tokenizer.end_ids)
    ids = [id for id in Engine(model.eval()).generate([prompt], sampling)[0].ids if id not in end]
    merged = options.work / f"merged-{int(time.time())}"
    export_directory(run.directory, merged, dtype="fp32")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(merged)
    result = {
        "options": {key: value for key, value in vars(options).items() if key != "work"},
        "runs": runs,
        "transformers_greedy_ids_equal": greedy(theirs, prompt, end) == ids,
        "answer": tokenizer.decode(ids, skip_special_tokens=True),
        "served_answer": ask_server(run.directory),
    }
    print(json.dumps(result, indent=1))
    if options.save:
        print(machine.save("smollm2_dpo", result))


if __name__ == "__main__":
    main()
