"""Where a server listens."""

from __future__ import annotations

import socket

from gptsmith.errors import UsageError


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. Raises UsageError where that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen at {host}:{port}: {reason}. Choose another --host or --port.") from None
    return listening


LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names by which a machine reaches itself."""


def is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")
