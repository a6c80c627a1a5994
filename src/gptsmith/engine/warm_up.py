"""Compile the CPU kernels in a process of their own: `python -m gptsmith.engine.warm_up`.

The process that compiles them can round differently from those that load them from the cache afterwards. Reinforcement
learning is to continue with the same bits in another process, so it always loads them.
"""

from __future__ import annotations

import subprocess
import sys

import torch

from gptsmith.engine.cpu_runner import is_supported
from gptsmith.kernels.threads import announce_compiling, are_compiled
from gptsmith.model.transformer import Transformer


def kernels_ready(model: Transformer) -> bool:
    """Return whether the kernels can run this model and lie compiled in the cache; compile them first if needed."""
    if not is_supported(model):
        return False
    if not are_compiled():
        announce_compiling()
        subprocess.run([sys.executable, "-m", "gptsmith.engine.warm_up"], check=False, capture_output=True)
    return are_compiled()


def main() -> None:
    """Run a small model with the kernels, which compiles them if they are not in the cache."""
    from gptsmith.engine.engine import Engine
    from gptsmith.engine.sampling import SamplingParams
    from gptsmith.model.families import FAMILIES

    torch.set_num_threads(1)
    config = FAMILIES["llama"](
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16
    )
    Engine(Transformer(config), kernels="always").generate([[1, 2, 3]], SamplingParams(max_tokens=2))


if __name__ == "__main__":
    main()
