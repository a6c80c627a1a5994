"""Cache directory, device, precision and other properties of the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.errors import GptsmithError, UsageError
from gptsmith.runtime import (
    available_cores,
    cache_directory,
    choose_device,
    choose_precision,
    compiler_available,
    describe_machine,
)

CPU = torch.device("cpu")


def test_the_cache_directory_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path / "a" / "b"))
    assert cache_directory() == tmp_path / "a" / "b"
    assert cache_directory().is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="other platforms keep caches elsewhere")
@pytest.mark.parametrize("chosen", [None, ""])
def test_the_default_cache_directory_is_the_platforms(
    chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if chosen is None:
        monkeypatch.delenv("GPTSMITH_CACHE")
    else:
        monkeypatch.setenv("GPTSMITH_CACHE", chosen)
    assert cache_directory() == tmp_path / "gptsmith"


def test_an_unusable_cache_directory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(GptsmithError, match="part of that path is a file"):
        cache_directory()


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_fastest_device(cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device().type == expected


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1", "meta", "vulkan", "tpu"])
def test_unknown_devices_are_rejected(name: str) -> None:
    with pytest.raises(UsageError, match="--device.*cuda:N"):
        choose_device(name)


def test_missing_devices_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UsageError, match="this machine has 1 CUDA"):
        choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="this machine has 0 CUDA GPUs. Use --device auto."):
        choose_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no Apple GPU"):
        choose_device("mps")


def test_precision_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, answer=has_bf16, **k: answer)
        assert choose_precision("auto", gpu) == expected
        assert choose_precision("fp32", gpu) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"
    with pytest.raises(UsageError, match="--precision fp16 requires a GPU"):
        choose_precision("fp16", CPU)


def test_a_compiler_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not compiler_available(CPU)
    if sys.platform != "win32":
        compiler = tmp_path / "g++"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        assert compiler_available(CPU)
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert not compiler_available(CPU)
    assert not compiler_available(torch.device("mps"))


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["cores"] == available_cores() >= 1
    assert machine["torch"] == torch.__version__
    assert machine["processor"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_cores_respect_the_affinity_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(_: Any) -> set[int]:
        return {3, 5}

    monkeypatch.setattr(os, "sched_getaffinity", mask)
    assert available_cores() == 2
