"""Ctrl-C, SIGTERM and SIGHUP: the first asks the run to save and stop, a second one ends the process immediately."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from gptsmith.log import note

NOTICE = "Stopping after saving a checkpoint. Press Ctrl-C again to quit now."


class StopSignal:
    """While entered, turn the first SIGINT, SIGTERM or SIGHUP into `requested`. Calling it returns whether one came.

    announces: whether to say so at once. Of several processes, the first says so once they have agreed.
    """

    def __init__(self) -> None:
        self.number = 0
        self.announces = True
        self._entered = 0
        self.previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.number != 0

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> StopSignal:
        self._entered += 1
        if self._entered == 1 and threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # SIGHUP: the terminal was closed; not on Windows
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
                    self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)  # saving is atomic: no older checkpoint is lost
        self.number = number
        if self.announces:
            note(f"\n{NOTICE}")
