"""HTTP servers of this process."""

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from wwwserve.serving.config import LimitsConfig
from wwwserve.serving.http.connection import Connection

ACCEPTED_S = 0.2  # in which what was accepted has become a connection


class Server(uvicorn.Server):
    """A server that leaves signals to its process, and no connection open when it ends."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`, which leaves open what was accepted just before it closed its listeners: a client that
        goes on to use that is answered by what has ended."""
        late = asyncio.get_running_loop().call_later(ACCEPTED_S, self._close_all)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()
            self._close_all()

    def _close_all(self) -> None:
        for connection in list(self.server_state.connections):
            connection.shutdown()


def server_of(app: Any, limits: LimitsConfig, tls: ssl.SSLContext | None = None) -> Server:
    """A server of an ASGI application, over TLS with a context for that."""
    return Server(uvicorn.Config(
        app, http=Connection.limited(limits, tls), lifespan="off", ws="none",
        log_config=None, log_level="critical", access_log=False, timeout_graceful_shutdown=5,
        timeout_keep_alive=60, server_header=False, date_header=False, proxy_headers=False,
    ))  # fmt: skip
