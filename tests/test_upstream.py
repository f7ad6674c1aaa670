"""A request to an engine ends with its response or an error, and its connection is kept only if it is fit to be."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import wraps
from typing import Any

import pytest
import uvloop

from wwwserve.serving.http.transport import MOST_PIECE, AiohttpTransport, AnswerTooLarge, Response, Transport
from wwwserve.serving.http.upstream import MOST_HEAD, MOST_UNREAD, DirectTransport, Site, _Connection

LONG_S = 20.0
MOST = 1 << 20
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\ncontent-length: 5\r\n\r\nhello"


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs in an event loop, a node's."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        uvloop.run(test(*args, **kwargs))

    return run


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One request, head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
    return head + await reader.readexactly(size)


class Server:
    """A server that does as it is told on each connection, and what became of them."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.closed = asyncio.Event()  # by the client


class Upstream:
    """The way to it."""

    def __init__(self, transport: Transport, port: int, path: str, read_s: float) -> None:
        self.transport, self.port, self.read_s = transport, port, read_s
        self.url = f"http://127.0.0.1:{port}{path}"

    def post(
        self, path: str, body: bytes, timeout_s: float | None = None, **headers: str
    ) -> AbstractAsyncContextManager[Response]:
        sent = {"x-one": "1", **headers}
        return self.transport.request(
            "POST", self.url + path, body=body, headers=sent, timeout_s=timeout_s, read_timeout_s=self.read_s
        )

    @property
    def idle(self) -> list[_Connection]:
        assert isinstance(self.transport, DirectTransport)
        return self.transport.idle_at(Site("127.0.0.1", self.port, False))


@asynccontextmanager
async def site(
    *turns: bytes | Serve | None, read_s: float = LONG_S, path: str = "", general: bool = False
) -> AsyncIterator[tuple[Server, Upstream]]:
    """A server that answers its requests by `turns`, one after the other: bytes, a coroutine, or None to hang up."""
    seen, left = Server(), list(turns)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.connections += 1
        try:
            while True:
                seen.requests.append(await read_request(reader))
                turn = left.pop(0)
                if turn is None:
                    break
                if isinstance(turn, bytes):
                    writer.write(turn)
                else:
                    await turn(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            seen.closed.set()
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    transport = AiohttpTransport() if general else DirectTransport()
    try:
        yield seen, Upstream(transport, server.sockets[0].getsockname()[1], path, read_s)
    finally:
        if isinstance(transport, AiohttpTransport):
            await transport.close()
        else:
            transport.close()
        server.close()


async def whole(upstream: Upstream, body: bytes = b"{}") -> tuple[int, Mapping[str, str], bytes]:
    async with upstream.post("/v1/x", body) as response:
        return response.status, response.headers, await response.read(MOST)


@pytest.mark.parametrize("general", [False, True])
@in_loop
async def test_what_comes_at_once_is_passed_on_in_pieces_and_others_have_their_turns(general: bool) -> None:
    body = bytes(range(256)) * 4000
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (6 + len(body)) + b"first\n" + body
    async with site(answer, WHOLE, general=general) as (seen, upstream):
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with upstream.post("/v1/x", b"{}") as response:
            await asyncio.sleep(0.1)  # for much of it to be there
            counting, sizes, came = asyncio.create_task(count()), [], await response.readline(100)
            async for piece in response.iter_any():
                came += piece
                sizes.append(len(piece))
            counting.cancel()
        assert came == b"first\n" + body
        assert max(sizes) <= MOST_PIECE and turns > len(sizes) // 2 >= len(body) // MOST_PIECE // 2
        assert (await whole(upstream))[2] == b"hello" and seen.connections == 1


@in_loop
async def test_a_request_goes_as_it_is_and_its_connection_is_kept() -> None:
    async with site(WHOLE, WHOLE, path="/base") as (seen, upstream):
        status, headers, body = await whole(upstream, b'{"a": 1}')
        assert (status, body) == (200, b"hello")
        assert headers == {"content-type": "text/plain", "content-length": "5"}
        await whole(upstream)
    head, _, sent = seen.requests[0].partition(b"\r\n\r\n")
    assert sent == b'{"a": 1}'
    assert head.startswith(b"POST /base/v1/x HTTP/1.1\r\n")
    assert set(head.split(b"\r\n")[1:]) == {
        b"host: 127.0.0.1:%d" % upstream.port, b"x-one: 1", b"content-length: 8"
    }  # fmt: skip
    assert seen.connections == 1 and len(seen.requests) == 2


@in_loop
async def test_at_once_each_has_a_connection_of_its_own() -> None:
    all_there = asyncio.Event()

    async def together(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(seen.requests) == 3:
            all_there.set()
        await all_there.wait()
        writer.write(WHOLE)

    async with site(together, together, together) as (seen, upstream):
        answers = await asyncio.wait_for(asyncio.gather(*(whole(upstream) for _ in range(3))), LONG_S)
        assert [body for _, _, body in answers] == [b"hello"] * 3
        assert seen.connections == len(upstream.idle) == 3


@in_loop
async def test_chunks_come_one_by_one_and_an_interim_response_is_passed_over() -> None:
    more = asyncio.Event()

    async def stream(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 100 Continue\r\nx: y\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await more.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

    async with site(stream, WHOLE) as (seen, upstream):
        async with upstream.post("/", b"") as response:
            assert response.status == 200 and "x" not in response.headers
            pieces = response.iter_any()
            assert await anext(pieces) == b"one"
            more.set()
            assert [piece async for piece in pieces] == [b"two"]
        await whole(upstream)
        assert seen.connections == 1


@in_loop
async def test_without_a_length_the_body_goes_to_the_end_of_the_connection() -> None:
    async def to_the_end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        writer.close()

    async with site(to_the_end) as (_, upstream):
        assert (await whole(upstream))[2] == b"all of it"
        assert not upstream.idle


@pytest.mark.parametrize(
    "part",
    [
        b"", b"HTTP/1.1 200 OK\r\ncontent-le", b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", b"SSH-2.0-OpenSSH\r\n",
    ],
)  # fmt: skip
@in_loop
async def test_what_breaks_off_or_is_not_http_is_an_error(part: bytes) -> None:
    async def break_off(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(part)
        writer.close()

    async with site(break_off) as (_, upstream):
        with pytest.raises(ConnectionError):
            await whole(upstream)
        assert not upstream.idle


@in_loop
async def test_a_kept_connection_that_is_closed_is_replaced_once() -> None:
    async with site(WHOLE, None, WHOLE, None, None) as (seen, upstream):
        await whole(upstream)
        assert (await whole(upstream))[2] == b"hello"  # on a second connection, as the first hangs up when asked
        assert seen.connections == 2 and len(seen.requests) == 3
        with pytest.raises(ConnectionError):
            await whole(upstream)
        assert seen.connections == 3 and len(seen.requests) == 5


@in_loop
async def test_what_a_kept_connection_began_to_answer_is_not_sent_again() -> None:
    async def begin(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
        writer.close()

    async with site(WHOLE, begin, WHOLE) as (seen, upstream):
        await whole(upstream)
        with pytest.raises(ConnectionError):
            await whole(upstream)
        assert len(seen.requests) == 2


@in_loop
async def test_a_connection_that_its_server_closes_is_forgotten() -> None:
    closing = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    async with site(closing, WHOLE, None) as (_, upstream):
        await whole(upstream)
        assert not upstream.idle
        await whole(upstream)
        [kept] = upstream.idle
        kept.transport.write(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n")  # to which the server hangs up
        async with asyncio.timeout(LONG_S):
            while upstream.idle:
                await asyncio.sleep(0.005)


@in_loop
async def test_a_second_response_to_one_request_reaches_nobody() -> None:
    async with site(WHOLE + WHOLE.replace(b"hello", b"stray"), WHOLE) as (seen, upstream):
        assert (await whole(upstream))[2] == b"hello"
        assert (await whole(upstream))[2] == b"hello"
        assert seen.connections == 2


@in_loop
async def test_leaving_before_the_end_breaks_off() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        await reader.readexactly(1)

    async with site(endless) as (seen, upstream):
        async with upstream.post("/", b"") as response:
            assert response.status == 200
        await asyncio.wait_for(seen.closed.wait(), LONG_S)
        assert not upstream.idle


@in_loop
async def test_cancelled_before_the_head_it_breaks_off() -> None:
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.readexactly(1)

    async with site(silent) as (seen, upstream):
        task = asyncio.create_task(whole(upstream))
        await asyncio.wait_for(asked.wait(), LONG_S)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        await asyncio.wait_for(seen.closed.wait(), LONG_S)


@in_loop
async def test_silence_is_given_up_but_not_a_slow_sender() -> None:
    async def slow(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
        for _ in range(5):
            await asyncio.sleep(0.3)
            writer.write(b"a")

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)

    async with site(slow, silent, silent, read_s=1.0) as (seen, upstream):
        assert (await whole(upstream))[2] == b"aaaaa"
        with pytest.raises(TimeoutError, match="1 s"):
            await whole(upstream)
        assert len(seen.requests) == 2  # not asked again
        await asyncio.wait_for(seen.closed.wait(), LONG_S)


@in_loop
async def test_a_slow_reader_makes_its_sender_wait_and_gets_all() -> None:
    size, sent = 64 * MOST_UNREAD, 0

    async def large(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(b"x" * MOST_UNREAD)
            await writer.drain()
            sent += MOST_UNREAD

    async with site(large, WHOLE, read_s=0.3) as (seen, upstream):
        async with upstream.post("/", b"") as response:
            await asyncio.sleep(0.8)  # longer than its sender may be silent
            assert sent < size
            got = 0
            async for piece in response.iter_any():
                got += len(piece)
            assert got == size
        await whole(upstream)
        assert seen.connections == 1


@in_loop
async def test_nobody_there_is_an_error_at_once() -> None:
    async with site() as (_, upstream):
        pass
    with pytest.raises(OSError):
        await asyncio.wait_for(whole(upstream), LONG_S)


# What both transports promise.

both = pytest.mark.parametrize("general", [False, True])


@both
@in_loop
async def test_a_body_is_read_to_its_end_and_no_farther_than_allowed(general: bool) -> None:
    async def in_parts(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf")
        await asyncio.sleep(0.05)
        writer.write(b"half")

    async with site(in_parts, in_parts, general=general) as (_, upstream):
        async with upstream.post("/", b"") as response:
            assert await response.read(8) == b"halfhalf"
        async with upstream.post("/", b"") as response:
            with pytest.raises(AnswerTooLarge):
                await response.read(7)


@both
@in_loop
async def test_a_line_is_read_and_then_the_rest(general: bool) -> None:
    async def lines(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\non")
        await asyncio.sleep(0.05)
        writer.write(b"e\ntwo\nend")

    async with site(lines, lines, general=general) as (_, upstream):
        async with upstream.post("/", b"") as response:
            assert await response.readline(4) == b"one\n"
            assert await response.read(7) == b"two\nend"
        async with upstream.post("/", b"") as response:
            with pytest.raises(AnswerTooLarge):
                await response.readline(3)


@both
@in_loop
async def test_redirects_are_not_followed_and_cookies_not_kept(general: bool) -> None:
    redirect = b"HTTP/1.1 307 Go\r\nlocation: /other\r\nset-cookie: a=b\r\ncontent-length: 0\r\n\r\n"
    async with site(redirect, WHOLE, general=general) as (seen, upstream):
        assert (await whole(upstream))[0] == 307
        await whole(upstream)
        assert len(seen.requests) == 2 and b"other" not in seen.requests[1] and b"ookie" not in seen.requests[1]


@both
@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/a HTTP/1.1\r\n\r\nDELETE /b", {}), ("/a\r\nx: y", {}), ("/a b", {}), ("/a\x00", {}), ("/\u0130", {}),
        ("/", {"x-two": "1\r\nx: y"}), ("/", {"x two": "1"}),
    ],
)  # fmt: skip
@in_loop
async def test_nothing_can_be_smuggled_into_a_request(path: str, headers: dict[str, str], general: bool) -> None:
    async with site(WHOLE, general=general) as (seen, upstream):
        with pytest.raises(OSError):
            async with upstream.post(path, b"", **headers):
                pass
        assert not seen.requests


@both
@in_loop
async def test_it_can_be_closed_while_it_is_read_and_takes_no_longer_than_allowed(general: bool) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
        await reader.readexactly(1)

    async with site(silent, silent, general=general) as (_, upstream):
        async with upstream.post("/", b"") as response:
            asyncio.get_running_loop().call_later(0.05, response.close)
            with pytest.raises(OSError):
                await asyncio.wait_for(response.read(MOST), LONG_S)
        with pytest.raises(TimeoutError):
            async with upstream.post("/", b"", timeout_s=0.1) as response:
                await response.read(MOST)


@in_loop
async def test_a_head_without_end_is_given_up() -> None:
    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * MOST_HEAD)
        await writer.drain()

    async with site(endless) as (_, upstream):
        with pytest.raises(ConnectionError):
            await whole(upstream)
