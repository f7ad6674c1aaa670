"""The wire between nodes: TLS bound to their keys, and a listener of the operator's own."""

import asyncio
import contextlib
import errno
import gc
import json
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
import uvloop
from stub_nodes import GOOD, MODEL, Stub, busy, net, play
from test_peers import BODY, CHAT, refusals

from wwwserve.serving import config
from wwwserve.serving.delegation import PROMPT, TARIFF
from wwwserve.serving.http import connection, routes
from wwwserve.serving.http.certificates import NODE_HOST, PeerContext, server_context
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import SIGNATURE, Messages
from wwwserve.serving.http.places import Places
from wwwserve.serving.http.transport import AiohttpTransport
from wwwserve.serving.local_nodes import NetworkError, free_ports, look
from wwwserve.serving.membership.heartbeat import BEAT_PATH
from wwwserve.serving.node import tell_of_error


def test_nodes_hand_over_and_pay_over_tls() -> None:
    async def scene() -> None:
        async with net(busy(), Stub(), tls={}) as n:
            status, body, _ = await n.ask()
            assert status == 200 and json.loads(body)["from"] == n.stubs[1].url
            status, answer, _ = await n.ask(stream=True)
            assert status == 200 and n.stubs[1].url.encode() in answer and answer.endswith(b"data: [DONE]\n\n")
            assert await refusals(n, "uncertified") == 0

    play(scene)


def test_over_uvloop_as_a_node_runs_too() -> None:
    async def scene() -> None:
        async with net(busy(), Stub(), tls={}) as n:
            assert json.loads((await n.ask())[1])["from"] == n.stubs[1].url

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scene(), 120.0))


@contextlib.asynccontextmanager
async def impostor(identity: Identity, port: int, seen: list[bytes], tls: bool = True) -> AsyncIterator[None]:
    """A server at a peer's address that has another key, or no TLS."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(65536))
        writer.close()

    context = server_context(identity) if tls else None
    async with await asyncio.start_server(serve, "127.0.0.1", port, ssl=context):
        yield


@pytest.mark.parametrize("tls", [True, False])
def test_who_has_not_the_key_that_a_peer_is_to_have_gets_not_a_byte(tls: bool) -> None:
    async def scene() -> None:
        identity, peer, seen, port = Identity.generate(), Identity.generate(), list[bytes](), free_ports(1)[0]
        transport = AiohttpTransport(identity=identity)
        try:
            async with impostor(Identity.generate(), port, seen, tls):
                for url in (f"https://127.0.0.1:{port}", f"http://127.0.0.1:{port}"):
                    with pytest.raises(OSError):
                        async with transport.request(
                            "POST", url, body=b"secret", headers={}, timeout_s=5.0, read_timeout_s=5.0, peer=peer.name
                        ):
                            pass
            assert b"".join(seen).find(b"secret") < 0 and not any(b"POST" in each for each in seen)
            async with impostor(peer, port, seen):  # who has it, gets it
                with pytest.raises(OSError):
                    async with transport.request(
                        "POST", f"https://127.0.0.1:{port}", body=b"secret", headers={}, timeout_s=5.0,
                        read_timeout_s=5.0, peer=peer.name,
                    ):  # fmt: skip
                        pass
            assert b"secret" in b"".join(seen)
        finally:
            await transport.close()

    play(scene)


def test_a_server_that_is_no_peer_is_checked_as_usual(tmp_path: Path) -> None:
    async def scene() -> None:
        seen, port = list[bytes](), free_ports(1)[0]
        transport = AiohttpTransport(identity=Identity.generate())
        try:
            async with impostor(Identity.generate(), port, seen):
                with pytest.raises(OSError, match=r"(?i)certificate"):
                    async with transport.request(
                        "GET", f"https://127.0.0.1:{port}", headers={}, timeout_s=5.0, read_timeout_s=5.0
                    ):
                        pass
            assert not b"".join(seen)
        finally:
            await transport.close()

    play(scene)


def test_what_comes_by_a_connection_of_another_key_is_refused() -> None:
    """A peer's signature alone is not enough: the connection has to be its own."""

    async def scene() -> None:
        async with net(Stub(), Stub(), tls={}) as n:
            peer = Messages(n.keys[1], lambda name: True)
            run = (await n.see())["run"]
            to = n.keys[0].name
            for context, status in (
                (None, 403), (PeerContext.to(Identity.generate(), to), 403), (PeerContext.to(n.keys[1], to), 200),
            ):  # fmt: skip
                terms = {PROMPT: "12", TARIFF: "1000000 250000 1000000"}
                terms[SIGNATURE] = peer.sign(to, run, CHAT, terms, BODY)
                connector = aiohttp.TCPConnector(ssl=context or False)
                async with aiohttp.ClientSession(connector=connector) as session:
                    async with session.post(n.urls[0] + CHAT, data=BODY, headers=terms) as response:
                        answer = await response.read()
                        assert response.status == status, answer
                        assert status == 200 or b"uncertified" in answer
                    if context is None:
                        beat = n.keys[1].name.encode() + b"x" * 200
                        async with session.post(n.urls[0] + BEAT_PATH, data=beat) as response:
                            assert response.status == 403 and b"uncertified" in await response.read()
            assert n.stubs[0].begun == 1

    play(scene)


def test_users_see_an_ordinary_certificate_and_nodes_the_nodes_own(tmp_path: Path) -> None:
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    files = {"certificate": str(tmp_path / "certificate.pem"), "key": str(tmp_path / "key.pem")}
    made.cert_chain_pems[0].write_to_path(files["certificate"])
    made.private_key_pem.write_to_path(files["key"])

    async def scene() -> None:
        async with net(busy(), Stub(), tls=files) as n:
            assert json.loads((await n.ask())[1])["from"] == n.stubs[1].url
            trusting = ssl.create_default_context()
            authority.configure_trust(trusting)
            body = {"model": MODEL, "messages": []}
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session:
                async with session.post(n.urls[0] + "/v1/chat/completions", json=body) as response:
                    assert response.status == 200
                with pytest.raises(aiohttp.ClientError):
                    await session.get(n.urls[0] + "/health", server_hostname=NODE_HOST)

    play(scene)


def test_files_that_are_no_certificate_and_key_are_named(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    Identity.generate().save(key)
    with pytest.raises(OSError, match=rf"^{key} and {key} are no certificate and its key"):
        server_context(Identity.generate(), key, key)


def test_what_is_no_tls_and_what_is_slow_to_agree_shuts_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with net(Stub(), tls={}, limits={"connections": 16}) as n:
            port = int(n.urls[0].rpartition(":")[2])
            writers = []
            for k in range(60):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET / HTTP/1.1\r\n\r\n" if k % 2 else b"\x16\x03\x01")
                writers.append(writer)
            for _ in range(3):
                async with (
                    aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session,
                    session.get(n.urls[0] + "/health") as response,
                ):
                    assert response.status == 200
            for writer in writers:
                writer.transport.abort()

    play(scene)


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_all_are_answered_that_come_over_tls_at_once(
    loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those whose first bytes are there before the node, which is busy, knows of the connection."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    hosts: list[str] = []
    monkeypatch.setattr(routes, "_is_here", lambda scope: hosts.append(scope["client"][0]) or True)

    def answer(port: int) -> bytes:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30.0) as raw,
            context.wrap_socket(raw) as secured,
        ):
            secured.sendall(b"GET /health HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n")
            return secured.recv(12)

    async def scene() -> None:
        async with net(Stub(), tls={}) as n:
            port = int(n.urls[0].rpartition(":")[2])
            with ThreadPoolExecutor(100) as pool:
                asked = [asyncio.get_running_loop().run_in_executor(pool, answer, port) for _ in range(100)]
                for _ in range(5):
                    time.sleep(0.2)  # the loop is blocked
                    await asyncio.sleep(0.02)
                assert await asyncio.gather(*asked) == [b"HTTP/1.1 200"] * 100
            assert set(hosts) == {"127.0.0.1"}

    monkeypatch.setattr(connection, "HANDSHAKE_S", 60.0)  # a hundred threads of clients share this process
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(scene(), 120.0))


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_who_agrees_on_tls_while_the_node_is_frozen_is_answered(
    loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped for longer than an agreement may take does not take that for the client's delay."""
    monkeypatch.setattr(connection, "HANDSHAKE_S", 1.0)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def answer(raw: socket.socket) -> bytes:
        with raw, context.wrap_socket(raw) as secured:
            secured.sendall(b"GET /health HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n")
            return secured.recv(12)

    async def scene() -> None:
        async with net(Stub(), tls={}) as n:
            raw = socket.create_connection(("127.0.0.1", int(n.urls[0].rpartition(":")[2])), timeout=30.0)
            await asyncio.sleep(0.1)  # it is accepted
            with ThreadPoolExecutor(1) as pool:
                asked = asyncio.get_running_loop().run_in_executor(pool, answer, raw)
                time.sleep(2.0)  # the loop is blocked
                assert await asked == b"HTTP/1.1 200"

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(scene(), 60.0))


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_who_never_agrees_on_tls_leaves_no_place_and_no_file_behind(
    loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who says nothing, who speaks no TLS, who hangs up at once, and who has to make room for others."""
    monkeypatch.setattr(connection, "HANDSHAKE_S", 0.5)

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def scene() -> None:
        places = Places[Any](8, 100, 0)
        context = server_context(Identity.generate())
        make: Any = lambda before: asyncio.Protocol()  # noqa: E731
        gates: list[connection.Gate] = []

        def gate() -> connection.Gate:
            gates.append(connection.Gate(make, places, context))
            return gates[-1]

        server = await asyncio.get_running_loop().create_server(gate, "127.0.0.1", 0)
        port, before = server.sockets[0].getsockname()[1], files()
        clients = []
        for k in range(30):
            clients.append(socket.create_connection(("127.0.0.1", port), timeout=5.0))
            if k % 3 == 1:
                clients[-1].sendall(b"GET / HTTP/1.1\r\n\r\n")
            if k % 3 == 2:
                clients[-1].close()
            if k % 4 == 0:
                await asyncio.sleep(0.01)
        silent = clients[-3]
        silent.setblocking(False)
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(silent, 1), 20.0) == b""
        for client in clients:
            client.close()
        until_s = time.monotonic() + 20.0
        while len(gates) < 30 or files() > before or places._address:
            assert time.monotonic() < until_s
            await asyncio.sleep(0.02)

        def refuse(number: int) -> int:
            raise OSError(errno.EMFILE, "too many open files")

        monkeypatch.setattr(connection.os, "dup", refuse)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setblocking(False)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1), 20.0) == b""
        assert len(gates) == 31 and not places._address
        server.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(scene(), 60.0))


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_peer_that_resets_connections_has_no_other_file_closed(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    """uvloop leaves a socket whose descriptor it has closed, which would close that number again when it is collected:
    of another connection, or of the ledger."""
    resets = socket.create_server(("127.0.0.1", 0))

    def reset() -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = resets.accept()
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                time.sleep(0.001)
                accepted.close()

    async def scene() -> None:
        transport = AiohttpTransport(identity=Identity.generate())
        url, peer = f"https://127.0.0.1:{resets.getsockname()[1]}/", Identity.generate().name
        files = []
        for _ in range(100):
            with pytest.raises(OSError):
                async with transport.request("GET", url, headers={}, timeout_s=9.0, read_timeout_s=9.0, peer=peer):
                    pass
            files.append(os.open(tmp_path, os.O_RDONLY))  # has the number of what was closed last
        gc.collect()
        for each in files:
            os.fstat(each)
            os.close(each)
        await transport.close()

    threading.Thread(target=reset, daemon=True).start()
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(scene(), 60.0))
    resets.close()


def test_an_error_that_nobody_handled_is_logged_but_for_that_of_a_closed_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        closed = "unable to perform operation on <TCPTransport closed=True>; the handler is closed"
        for error in (RuntimeError(closed), RuntimeError("another"), ValueError("the handler is closed")):
            tell_of_error(loop, {"message": "Fatal error on SSL protocol", "exception": error})

    asyncio.run(scene())
    told = [record.exc_info for record in caplog.records if record.name == "asyncio"]
    assert [str(each[1]) for each in told if each] == ["another", "the handler is closed"]


def test_certificates_do_not_say_who_may_be_a_node_but_who_it_is() -> None:
    identity = Identity.generate()
    one, other = (PeerContext.to(identity, "x" * 43) for _ in range(2))
    assert [c["subject"] for c in one.get_ca_certs()] == [c["subject"] for c in other.get_ca_certs()]
    assert one.minimum_version == ssl.TLSVersion.TLSv1_3 and one.verify_mode == ssl.CERT_REQUIRED
    context = server_context(identity)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3 and context.verify_mode == ssl.CERT_OPTIONAL


# The operator's own listener.


@pytest.mark.parametrize("key", [None, "secret"])
def test_with_a_listener_of_its_own_the_operators_pages_are_there_alone_and_health_is_for_everyone(
    key: str | None,
) -> None:
    port = free_ports(1)[0]

    async def scene() -> None:
        async with net(Stub()) as n:
            n.running[0].cancel()
            await asyncio.gather(n.running[0], return_exceptions=True)
            n.configs[0]["admin"] = {"port": port} | ({"key": key} if key is not None else {})
            await n.start(0)
            headers = {"authorization": f"Bearer {key}"} if key is not None else {}
            for page in ("/health", "/metrics", "/network"):
                async with n.session.get(n.urls[0] + page) as response:
                    assert response.status == (200 if page == "/health" else 404)
                async with n.session.get(f"http://127.0.0.1:{port}{page}", headers=headers) as response:
                    assert response.status == 200
                async with n.session.post(f"http://127.0.0.1:{port}{page}", headers=headers) as response:
                    assert response.status == 405
                if key is not None:
                    async with n.session.get(f"http://127.0.0.1:{port}{page}") as response:
                        assert response.status == 401
            async with n.session.get(f"http://127.0.0.1:{port}/v1/models", headers=headers) as response:
                assert response.status == 404
            assert (await asyncio.to_thread(look, f"http://127.0.0.1:{port}", key))["name"] == "n0"
            assert (await n.ask())[0] == 200

    play(scene)


def test_without_one_other_machines_get_to_know_whether_a_node_is_well_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            for page in ("/metrics", "/network"):
                async with n.session.get(n.urls[0] + page) as response:
                    assert response.status == 200
            monkeypatch.setattr(routes, "_is_here", lambda scope: False)
            for page, status in (("/metrics", 403), ("/network", 403), ("/health", 200)):
                async with n.session.get(n.urls[0] + page) as response:
                    assert response.status == status
                    assert page != "/health" or await response.json() == {"status": "ok"}
            with pytest.raises(NetworkError, match="403: this is shown on the node's own machine alone"):
                await asyncio.to_thread(look, n.urls[0])

    play(scene)


@pytest.mark.parametrize(("client", "is_here"), [
    (("127.0.0.1", 1), True), (("::1", 1), True), (("::ffff:127.0.0.1", 1), True), (None, True),
    (("10.0.0.1", 1), False), (("2001:db8::1", 1), False),
])  # fmt: skip
def test_who_is_on_this_machine(client: Any, is_here: bool) -> None:
    assert routes._is_here({"client": client}) is is_here


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"admin": {"host": "0.0.0.0"}}, "admin.key must be given"),
        ({"admin": {"port": 70000}}, "admin.port must be"),
        ({"admin": {"key": ""}}, "admin.key must be"),
        ({"tls": {"certificate": "x"}}, "both or neither"),
        ({"tls": {"certificate": "/nowhere", "key": "/nowhere"}}, "of files"),
        ({"tls": {}, "url": "http://a:1"}, "https:// with tls"),
        ({"tls": {}, "peers": [{"key": Identity.generate().name, "url": "http://a:1"}]}, "https:// with tls"),
        ({"trust": ["x"]}, "trust must be public keys"),
    ],
)
def test_a_wire_that_cannot_be_is_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(config.ConfigError, match=expected):
        config.parse(GOOD | change, "node.yaml")
    config.parse(GOOD | {"tls": {}, "url": "https://a:1", "admin": {"host": "0.0.0.0", "key": "k"}, "trust": []}, "t")
