"""HTTP servers of this process."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from wwwserve.serving.config import LimitsConfig
from wwwserve.serving.http.connection import Connection


class Server(uvicorn.Server):
    """A server that leaves signals to its process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def server_of(app: Any, limits: LimitsConfig, tls: ssl.SSLContext | None = None) -> Server:
    """A server of an ASGI application, over TLS with a context for that."""
    return Server(uvicorn.Config(
        app, http=Connection.limited(limits, tls), lifespan="off", ws="none",
        log_config=None, log_level="critical", access_log=False, timeout_graceful_shutdown=5,
        timeout_keep_alive=60, server_header=False, date_header=False, proxy_headers=False,
    ))  # fmt: skip
