"""A real chat model, tuned by LoRA and used everywhere: python benchmarks/tuning/smollm2.py [--steps 40] [--save]

smollm2-135m is tuned on alpaca_en_demo for some minutes: held-out loss and bits per byte of plain text, before and
after, and an answer. Then the run is read by transformers (exported) and by PEFT (the adapter over its base), which
have to continue a prompt with the same ids, greedily, and it is served and asked through the openai client.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

QUESTION = "Give three tips for staying healthy."
ANSWER_TOKENS = 40
OPTIONS = (
    *("--batch-size", "2", "--context", "384", "--eval-tokens", "6000", "--eval-every", "20"),
    *("--sample-tokens", "0", "--compile", "off"),
)


def greedy(model: Any, ids: list[int], end: set[int]) -> list[int]:
    """Return the greedy continuation by transformers."""
    import torch

    made = model.generate(
        torch.tensor([ids]), max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=sorted(end), pad_token_id=0
    )
    found: list[int] = made[0, len(ids) :].tolist()
    return found[:-1] if found and found[-1] in end else found


def ask_server(run: Path) -> str:
    """Serve the run, ask through the openai client, and return the answer."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "gptsmith", "serve", str(run), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(120):
            try:
                name = client.models.list().data[0].id
                break
            except openai.APIConnectionError:
                time.sleep(1)
        answer = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": QUESTION}], max_tokens=ANSWER_TOKENS, temperature=0
        )
        return answer.choices[0].message.content or ""
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--work", type=Path, default=common.MODELS / "smollm2", help="where models are kept")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/tuning_smollm2.json")
    a = parser.parse_args()
    import machine
    import peft
    import transformers

    import gptsmith
    from gptsmith.engine.engine import Engine
    from gptsmith.engine.sampling import SamplingParams
    from gptsmith.export.export import export_directory
    from gptsmith.tokenizer.chat import ChatTemplate
    from gptsmith.train.run import run_config_of

    base, out, merged = a.work / "base", a.work / "run", a.work / "merged"
    if not base.exists():
        export_directory("smollm2-135m", base, dtype="fp32")
    if not (out / "best").exists():
        command = ["sft", str(base), "alpaca_en_demo", "--steps", str(a.steps), "--out", str(out), *OPTIONS]
        subprocess.run([sys.executable, "-m", "gptsmith", *command], check=True)
    run = next(run for run in gptsmith.runs(a.work) if run.directory == out)
    evaluations = [row for row in run.metrics if "val_loss" in row]
    first, last = evaluations[0], evaluations[-1]
    options = run_config_of(run).flat()

    answers: dict[str, list[int]] = {}
    for name, source in (("before", base), ("after", out)):
        model, tokenizer = gptsmith.load(source)
        prompt = ChatTemplate(tokenizer).encode([{"role": "user", "content": QUESTION}])
        end = set(tokenizer.end_ids)
        sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, stop_ids=tokenizer.end_ids)
        completion = Engine(model.eval()).generate([prompt], sampling)[0].completions[0]
        answers[name] = [id for id in completion.ids if id not in end]
    if not merged.exists():
        export_directory(out, merged, dtype="fp32")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(merged)
    same = greedy(theirs, prompt, end) == answers["after"]
    hf: Any = transformers.AutoTokenizer.from_pretrained(merged)
    rendered = hf.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    adapter: Any = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), (out / "best").resolve()
    )
    same_peft = greedy(adapter, prompt, end) == answers["after"]
    result = {
        "seconds": round(last["time"]),
        "updates": last["step"],
        "options": {name: options[name] for name in ("steps", "batch_size", "context", "lora.rank", "optim.lr")},
        "tokens": last["tokens"],
        "held_out_loss": [round(first["val_loss"], 4), round(last["val_loss"], 4)],
        "text_bits_per_byte": [round(first["text_bits_per_byte"], 4), round(last["text_bits_per_byte"], 4)],
        "question": QUESTION,
        "answer": {name: tokenizer.decode(ids, skip_special_tokens=True) for name, ids in answers.items()},
        "transformers_greedy_ids_equal": same,
        "transformers_template_ids_equal": list(rendered) == list(prompt),
        "peft_greedy_ids_equal": same_peft,
        "served_answer": ask_server(out),
    }
    print(json.dumps(result, indent=1))
    if a.save:
        print(machine.save("tuning_smollm2", result))


if __name__ == "__main__":
    main()
