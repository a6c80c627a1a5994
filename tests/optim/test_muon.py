from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.optim.muon import Muon, orthogonalize


def test_newton_schulz_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 24, 60)
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.5
    assert values.max() < 1.3


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4),
    momentum=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_equals_torch_muon(shapes: list[tuple[int, int]], momentum: float, decay: float, seed: int) -> None:
    """Matrices of one shape are updated in a batch; torch.optim.Muon updates them one by one, in bfloat16."""
    reference_class = getattr(torch.optim, "Muon", None)
    if reference_class is None:
        pytest.skip("this version of torch has no Muon to compare with")
    torch.manual_seed(seed)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.1, momentum=momentum, weight_decay=decay)
    b = reference_class(theirs, lr=0.1, momentum=momentum, weight_decay=decay)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        # An update has spectral norm about 0.1 sqrt(rows/columns); bfloat16 is off by a few percent of that.
        assert (p - q).norm() <= 0.05 * 3 * 0.1 * max(1, p.shape[0] / p.shape[1]) ** 0.5 * min(p.shape) ** 0.5


def test_fused_projections_are_orthogonalized_part_by_part() -> None:
    torch.manual_seed(0)
    start = torch.randn(24, 12)
    fused = torch.nn.Parameter(start.clone())
    parts = [torch.nn.Parameter(part.clone()) for part in start.split((12, 8, 4))]
    gradient = torch.randn(24, 12)
    fused.grad = gradient.clone()
    for p, g in zip(parts, gradient.split((12, 8, 4)), strict=True):
        p.grad = g.clone()
    Muon([{"params": [fused], "split_sizes": [(12, 8, 4)]}]).step()
    Muon(parts).step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]))


def test_split_sizes_must_add_up() -> None:
    with pytest.raises(ValueError, match="split sizes .* do not add up to the 4 rows"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(4, 4))], "split_sizes": [(3,)]}])


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(4))])
