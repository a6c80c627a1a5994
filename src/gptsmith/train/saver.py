"""Asynchronous saving: a thread writes the checkpoint while the next step computes.

    read     weights and optimizer state are written from the tensors of training: they are not copied
    update   the next update of the weights waits for the end of that, and for nothing else
    finish   checksums, fsync and the renaming overlap with the following steps

Nothing changes the weights before the next update, so the checkpoint has exactly the state after its step. Besides the
model, at most one tensor is in memory: one that is stored in another layout, or comes from a GPU.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

Write = Callable[[Callable[[], None]], Path]
"""Writes a checkpoint and returns its directory; calls its argument once it has read the whole state."""


class Saver:
    """Writes one checkpoint at a time, in a thread. `wait_until_read` and `finish` raise its errors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step: int | None = None
        """The step whose checkpoint is being written, until `finish`."""
        self.stalled = 0.0
        """Seconds that training has waited for a checkpoint to be read, over the whole run."""
        self._thread: threading.Thread | None = None
        self._read = threading.Event()
        self._result: Path | None = None
        self._error: BaseException | None = None

    def start(self, step: int, write: Write) -> None:
        """Begin to write the checkpoint of `step`. The previous one must be finished."""
        assert self._thread is None, "the previous checkpoint is not finished"
        self.step, self._result, self._error = step, None, None
        self._read.clear()
        ready = None
        if self.device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self._thread = threading.Thread(target=self._run, args=(write, ready), name=f"save-{step}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no memory for another thread: training waits for the checkpoint instead
            self._thread.run()

    def _run(self, write: Write, ready: torch.cuda.Event | None) -> None:
        try:
            with contextlib.ExitStack() as stack:
                if ready is not None:  # read beside the kernels of the next step, after those of the last
                    stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
                    stream.wait_event(ready)
                    stack.enter_context(torch.cuda.stream(stream))
                self._result = write(self._read.set)
        except BaseException as error:
            self._error = error
        finally:
            self._read.set()

    def wait_until_read(self) -> None:
        """Wait until the weights and optimizer states may change. Raises the error of a failed write."""
        began = time.perf_counter()
        self._read.wait()
        self.stalled += time.perf_counter() - began
        if self._error is not None:
            self.finish()

    @property
    def done(self) -> bool:
        """Whether there is a checkpoint to `finish` without waiting."""
        return self._thread is not None and not self._thread.is_alive()

    def finish(self, timeout: float | None = None) -> Path | None:
        """Wait for the checkpoint, and return its directory; None if none is being written. Raises its error.

        timeout: seconds after which to stop waiting and return None.
        """
        if self._thread is None:
            return None
        if self._thread.ident is not None:  # it could be started
            self._thread.join(timeout)
        if self._thread.is_alive():
            return None
        self._thread, self.step = None, None
        if self._error is not None:
            raise self._error
        return self._result
