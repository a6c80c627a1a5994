"""Start the processes of a run on this machine, with TorchElastic."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from gptsmith.errors import GptsmithError, ProcessKilledError
from gptsmith.log import note
from gptsmith.runtime import available_cores

SHUTDOWN_SECONDS = "600"  # to save in after Ctrl-C, before processes are killed


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `gptsmith ARGUMENTS` in several processes and return their exit code: that of the first which failed.

    Ctrl-C, SIGTERM and SIGHUP are passed on to all of them. Output is theirs; the first one writes it.
    """
    cores = available_cores()
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    note(f"{processes} processes with OMP_NUM_THREADS={threads}, on {cores} cores")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # the processes say themselves what went wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "gptsmith", *arguments)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        codes = [failure.exitcode for failure in failures]
        if said := [code for code in codes if code > 0]:  # the others were killed, by TorchElastic or by the system
            return said[0]
        name = signal.Signals(-codes[0]).name
        raise ProcessKilledError(f"process {failures[0].local_rank} was killed by {name}.", 128 - codes[0]) from error
    except SignalException as error:
        return 128 + int(error.sigval)
    except OSError as error:
        raise GptsmithError(f"the processes cannot be started: {error.strerror or error}.") from error
    return 0
