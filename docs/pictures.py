"""The pictures of the README, from a run: python docs/pictures.py runs/demo"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import gptsmith
from gptsmith.log import JsonLines
from gptsmith.report.attention_maps import attention_figure, causal_mask_figure
from gptsmith.report.curves import loss_figure
from gptsmith.report.figures import save_png

IMAGES = Path(__file__).parent / "images"


def main(run: Path) -> None:
    IMAGES.mkdir(exist_ok=True)
    save_png(loss_figure(JsonLines(run / "metrics.jsonl").read()), IMAGES / "loss.png")
    model, tokenizer = gptsmith.load(run)
    ids = tokenizer.encode("ROMEO:\nBut soft!")
    tokens = [tokenizer.token_text(i) for i in ids]
    weights: list[torch.Tensor] = []
    with torch.no_grad():
        model(torch.tensor([ids]), weights=weights)
    save_png(attention_figure([w[0].numpy() for w in weights], tokens), IMAGES / "attention.png")
    save_png(causal_mask_figure(tokens), IMAGES / "causal_mask.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
