"""What the system says of errors is told in words."""

import asyncio
import errno
import re
import socket
import ssl
import urllib.error

import pytest

from wwwserve.serving.http.transport import AiohttpTransport, Transport
from wwwserve.serving.http.upstream import DirectTransport
from wwwserve.serving.plain import in_words


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 9)"), "nothing listens there"),
        (urllib.error.URLError(ConnectionRefusedError(errno.ECONNREFUSED, "x")), "nothing listens there"),
        (OSError(errno.ECONNRESET, "Connection reset by peer"), "the connection was broken off"),
        (socket.gaierror(-2, "Name or service not known"), "there is no such host"),
        (OSError(errno.ENETUNREACH, "x"), "its network cannot be reached"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.yaml"), "a.yaml: No such file or directory"),
        (TimeoutError(), "no answer in time"),
        (TimeoutError("nothing came for 2 s"), "nothing came for 2 s"),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 9)"),
         "Multiple exceptions: Connect call failed ('::1', 9)"),
        (ssl.SSLError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:1006)"),
         "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
        (KeyError("x-wwwserve-ttft"), "there is no x-wwwserve-ttft"),
        (ValueError(), "ValueError"),
    ],
)  # fmt: skip
def test_errors_are_told_in_words(error: Exception, said: str) -> None:
    assert in_words(error) == said


@pytest.mark.parametrize("general", [False, True])
def test_nobody_there_is_told_alike_by_both_transports(general: bool) -> None:
    async def scene() -> None:
        transport: Transport = AiohttpTransport() if general else DirectTransport()
        with pytest.raises((OSError, TimeoutError)) as raised:
            async with transport.request("GET", "http://127.0.0.1:9/", headers={}, timeout_s=30.0, read_timeout_s=30.0):
                pass
        assert in_words(raised.value) == "nothing listens there"
        if isinstance(transport, AiohttpTransport):
            await transport.close()

    asyncio.run(scene())


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("closed_here", [False, True])
def test_an_answer_that_breaks_off_is_told_without_names_of_a_library(general: bool, closed_here: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
        if not closed_here:
            writer.close()

    async def scene() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        transport: Transport = AiohttpTransport() if general else DirectTransport()
        async with server:
            with pytest.raises(OSError) as caught:
                async with transport.request("GET", url, headers={}, timeout_s=5.0, read_timeout_s=5.0) as response:
                    async for piece in response.iter_any():
                        assert piece == b"half"
                        if closed_here:
                            response.close()
            if isinstance(transport, AiohttpTransport):
                await transport.close()
        said.append(in_words(caught.value))

    said: list[str] = []
    asyncio.run(scene())
    assert not re.search(r"[a-z]Error|<", said[0]), said
