"""Tasks: questions whose answers are scored by code. Evaluation reports their mean score. No torch is needed here."""

from __future__ import annotations

from gptsmith.tasks.base import Conversation, Task
from gptsmith.tasks.registry import make_task, register_task

__all__ = ["Conversation", "Task", "make_task", "register_task"]
