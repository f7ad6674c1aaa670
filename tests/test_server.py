"""HTTP servers of this process."""

import asyncio
from typing import Any

from wwwserve.serving.config import LimitsConfig
from wwwserve.serving.http.server import server_of
from wwwserve.serving.node import listen


class Late:
    """A connection that is made while a server ends."""

    def __init__(self, connections: set[Any]) -> None:
        self.connections, self.is_shut = connections, False
        connections.add(self)

    def shutdown(self) -> None:
        """See `asyncio.Protocol` as uvicorn has it."""
        self.is_shut = True
        self.connections.discard(self)


def test_what_was_accepted_while_a_server_ends_is_closed() -> None:
    async def scene() -> bool:
        server = server_of(None, LimitsConfig())
        with listen("127.0.0.1", 0) as listener:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.001)
            server.should_exit = True
            while server.servers[0].is_serving():
                await asyncio.sleep(0.001)
            late = Late(server.server_state.connections)
            await serving
            return late.is_shut

    assert asyncio.run(scene())
