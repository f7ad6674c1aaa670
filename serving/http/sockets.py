"""Sockets for connections that nodes open, safe from being closed twice.

uvloop is handed a socket that is connected, and closes its descriptor itself. Where the other side resets the
connection before `create_connection` has come back, as a node does that is killed, uvloop 0.23 leaves the socket with
the number of a descriptor that is closed. Once the socket is collected it would close that number again, which may be
another connection's or the ledger's by then.
"""

import os
import socket
from typing import Any


class OwnSocket(socket.socket):
    """A socket that closes nothing but what it opened."""

    _opened: tuple[int, int] | None = None

    def close(self) -> None:
        """See `socket.socket`."""
        self._leave_what_is_not_ours()
        super().close()

    def __del__(self) -> None:
        """As it is collected, it is closed."""
        self._leave_what_is_not_ours()
        super().__del__()  # type: ignore[misc]

    def _leave_what_is_not_ours(self) -> None:
        number = self.fileno()
        if number >= 0 and self._opened is not None and _file(number) != self._opened:
            self.detach()


def _file(number: int) -> tuple[int, int] | None:
    """What a descriptor is of; None for none that is open."""
    try:
        found = os.fstat(number)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def own_socket(address: Any) -> OwnSocket:
    """For `aiohttp.TCPConnector`: a socket by which to connect to an address, as `getaddrinfo` gives it."""
    family, kind, protocol, *_ = address
    made = OwnSocket(family, kind, protocol)
    made._opened = _file(made.fileno())
    return made
