"""Simulated processes, which use private parts of torch: they must do what real ones do."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from gptsmith.distributed.layout import Layout
from gptsmith.distributed.simulator import check_version, simulated_process
from gptsmith.errors import GptsmithError


def test_a_process_of_many() -> None:
    before = {name: vars(torch.distributed.device_mesh.DeviceMesh)[name] for name in ("__init__", "__hash__", "mesh")}
    with simulated_process(1023, 1024) as ranks:
        assert (dist.get_rank(), dist.get_world_size()) == (1023, 1024)
        ranks.arrange(Layout(fsdp=128, tp=8), torch.device("cpu"))
        assert tuple(ranks.mesh.get_coordinate()) == (127, 7)
        with FakeTensorMode():
            x = torch.zeros(1 << 40)
            dist.all_reduce(x)
            assert ranks.mesh["tp"].mesh.tolist() == list(range(1016, 1024))
    assert not dist.is_initialized()
    assert before == {name: vars(torch.distributed.device_mesh.DeviceMesh)[name] for name in before}


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_version()
    for version in ("2.6.0", "2.99.0+cpu", "3.0.0"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(GptsmithError, match="dry-run needs torch 2.9 to"):
            check_version()
