"""Runs here are short: no report, and processes that end are given up sooner."""

from __future__ import annotations

import pytest
import torch

from gptsmith import api
from gptsmith.distributed import context
from gptsmith.model.dropout import dropout


@pytest.fixture(autouse=True, scope="session")
def imported() -> None:
    """Dropout's operator imports much of torch on its first call: once here, and not in every forked process."""
    dropout(torch.ones(4), 0.5, True)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_report", lambda directory: None)
    monkeypatch.setattr(context, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(context, "SILENT_SECONDS", 1.0)
