"""The Triton kernel: in Triton's interpreter where Triton is installed, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from gptsmith.model import loss as module
from gptsmith.model.config import IGNORED
from gptsmith.model.loss import cross_entropy_sum, linear_cross_entropy_sum

INTERPRETED = """
import torch
from gptsmith.model.config import IGNORED
from gptsmith.model.loss import cross_entropy_sum
from gptsmith.kernels.cross_entropy import loss_and_gradient

torch.manual_seed(0)
for columns, dtype in ((13, torch.float32), (9000, torch.bfloat16)):  # in one block and in two
    logits = (5 * torch.randn(9, columns)).to(dtype)
    targets = torch.randint(0, columns, (9,))
    targets[2] = IGNORED
    leaf = logits.float().requires_grad_()
    expected = cross_entropy_sum(leaf[None], targets[None])
    (gradient,) = torch.autograd.grad(expected, leaf)
    found = logits.clone()
    torch.testing.assert_close(loss_and_gradient(found, targets, IGNORED, False), expected.detach())
    assert torch.equal(found, logits)
    torch.testing.assert_close(loss_and_gradient(found, targets, IGNORED, True), expected.detach())
    torch.testing.assert_close(found, gradient.to(dtype), rtol=1e-2, atol=1e-6)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (torch for CUDA has it)"
)
def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("with_kernel", [False, True])
@pytest.mark.parametrize("rows", [100, 256, 1000])
def test_loss_and_gradients_equal_torch_s(with_kernel: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if with_kernel:
        assert module._gpu_kernel(torch.device("cuda", 0)) is not None
    else:
        monkeypatch.setattr(module, "_gpu_kernel", lambda device: None)
    torch.manual_seed(0)
    hidden = torch.randn(2, 384, 64, device="cuda", requires_grad=True)
    weight = torch.randn(9000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 9000, (2, 384), device="cuda")
    targets[0, :5] = IGNORED
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = linear_cross_entropy_sum(hidden, weight, targets, rows * 9000)
        expected = cross_entropy_sum(torch.nn.functional.linear(hidden, weight), targets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for ours, theirs in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()
