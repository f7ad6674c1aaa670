"""Addresses, paths and ports as people write them: in node.yaml, on the command line, and where they are taken."""

import asyncio
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from stub_nodes import GOOD, PROFILE, Net, Stub, net, play

from wwwserve.serving import cli, config, local_nodes, node
from wwwserve.serving.config import ConfigError
from wwwserve.serving.http.addresses import engine_base, here, is_free, is_loopback, is_unspecified, listen, netloc
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.local_nodes import NetworkError, Plan, configurations, write_nodes

KEY = Identity.generate().name
PLAN = Plan(nodes=2, base_port=0, policy=None, gpu="rtx-4090", model="qwen3-8b", max_num_seqs=8, speed=10.0)


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://h:8000", "http://h:8000"), ("http://h:8000/", "http://h:8000"), ("http://h:8000/v1", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"), ("https://h/llm/v1//", "https://h/llm"), ("http://h/v11", "http://h/v11"),
    ],
)  # fmt: skip
def test_an_engine_may_be_given_as_clients_are_told_it(given: str, base: str) -> None:
    assert engine_base(given) == base
    assert config.parse(GOOD | {"engine": {"url": given, "profile": PROFILE}}, "t").engine.url == base


def test_hosts() -> None:
    assert (netloc("10.0.0.1", 9), netloc("::1", 9), netloc("north", 9)) == ("10.0.0.1:9", "[::1]:9", "north:9")
    assert [is_unspecified(each) for each in ("0.0.0.0", "::", "::ffff:0.0.0.0", "127.0.0.1", "north")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    near = ("127.1.2.3", "::1", "::ffff:127.0.0.1", "localhost")
    assert [is_loopback(each) for each in (*near, "10.0.0.1", "::ffff:10.0.0.1", "north")] == [True] * 4 + [False] * 3
    assert (here("0.0.0.0"), here("::"), here("10.0.0.1")) == ("127.0.0.1", "::1", "10.0.0.1")


def test_files_are_looked_up_beside_the_one_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for name in ("chain.pem", "genesis.yaml"):
        (tmp_path / "etc" / name).write_text("x")
    (tmp_path / "etc" / "policy").mkdir()
    file = tmp_path / "etc" / "node.yaml"
    settings = {
        "policy": "policy", "tls": {"certificate": "chain.pem", "key": str(tmp_path / "etc" / "chain.pem")},
        "ledger": {"file": "n.db", "genesis": "genesis.yaml"},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(GOOD | settings))
    monkeypatch.chdir(tmp_path / "elsewhere")
    read = config.load(Path("../etc/node.yaml"))
    assert read.tls is not None and read.ledger is not None
    named = (read.key, read.policy, read.tls.certificate, read.tls.key, read.ledger.file, read.ledger.genesis)
    at = [Path(str(each)).resolve().relative_to(tmp_path / "etc").as_posix() for each in named]
    assert at == ["n.pem", "policy", "chain.pem", "chain.pem", "n.db", "genesis.yaml"]
    for name in ("cooperative", "earliest_finish", None):
        assert config.parse(GOOD | {"policy": name}, "t", tmp_path).policy == name
    membership = {"kind": "zenoh", "network": "x", "listen": ["tls/h:1"],
                  "tls": {"ca": "chain.pem", "certificate": "chain.pem", "key": "gone.pem"}}  # fmt: skip
    with pytest.raises(ConfigError, match=re.escape(f"a file, got '{tmp_path / 'etc' / 'gone.pem'}'")):
        config.parse(GOOD | {"membership": membership}, "t", tmp_path / "etc")


def test_a_bundle_that_a_local_network_is_given_counts_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path)
    nodes, _ = configurations(PLAN._replace(policy="bundle"))
    files = write_nodes(tmp_path / "files", nodes)
    assert {config.load(each.config).policy for each in files} == {str(tmp_path / "bundle")}


def test_each_node_of_a_local_network_has_engines_of_its_own() -> None:
    for count in (1, 3):
        nodes, commands = configurations(PLAN._replace(nodes=2, engines=count))
        parsed = [config.parse(node | {"key": "k"}, "t") for node in nodes]
        assert [len(each.engine.urls) for each in parsed] == [count, count]
        ports = [url.rpartition(":")[2] for each in parsed for url in each.engine.urls]
        assert len({*ports, *(str(each.port) for each in parsed)}) == 2 * count + 2
        assert all(port in command.argv for port, command in zip(ports, commands, strict=True))
    for wrong in (0, config.MOST_ENGINES + 1):
        with pytest.raises(NetworkError, match=f"--engines is {wrong}, expected 1 to {config.MOST_ENGINES}"):
            configurations(PLAN._replace(engines=wrong))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "http://0.0.0.0:9000"}, "every node's url must be an address at which others reach it"),
        ({"peers": [{"key": KEY, "url": "http://[::]:9000"}]}, "must be an address at which others reach it"),
        ({"host": "0.0.0.0", "peers": [{"key": KEY, "url": "http://h:2"}]}, "url must be given where there are peers"),
        ({"host": "::", "membership": {"kind": "zenoh", "network": "x", "listen": ["tcp/h:1"]}}, "url must be given"),
    ],
)
def test_an_address_that_nobody_reaches_is_not_told_to_peers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse(GOOD | change, "node.yaml")
    alone = config.parse(GOOD | {"host": "0.0.0.0"}, "node.yaml")  # for users alone
    assert alone.host == "0.0.0.0"


def test_a_taken_port_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        with pytest.raises(OSError, match=rf"127.0.0.1:{port} is in use by another program.*`admin.port`"):
            listen("127.0.0.1", port, "admin.port")
        with pytest.raises(NetworkError, match=rf"--base-port is {port}, and {port} is in use"):
            configurations(PLAN._replace(nodes=1, base_port=port))
    assert is_free("127.0.0.1", port)
    with pytest.raises(OSError, match=r"192\.0\.2\.1:0 is no address of this machine"):
        listen("192.0.2.1", 0)
    with pytest.raises(OSError, match="'no such host' is no host"):
        listen("no such host", 0)


async def end(n: Net) -> None:
    """All of its nodes."""
    for task in n.running:
        task.cancel()
    await asyncio.gather(*n.running, return_exceptions=True)


def test_a_free_port_is_one_that_browsers_open() -> None:
    """The console of a local network is at one; 10080 is for Amanda, and blocked: https://fetch.spec.whatwg.org."""
    count = 10_079 - local_nodes.PORTS[0]
    assert 10_080 not in local_nodes.PORTS and local_nodes.PORTS[count : count + 2] == [10_079, 10_081]


def test_slashes_at_the_end_of_urls_do_not_part_two_nodes() -> None:
    async def scene() -> None:
        async with net(Stub(), Stub()) as n:
            await end(n)
            for k, settings in enumerate(n.configs):
                settings["url"] = n.urls[k] + "/"
                settings["peers"] = [each | {"url": each["url"] + "/"} for each in settings["peers"]]
                settings["engine"] = settings["engine"] | {"url": n.stubs[k].url + "/v1/"}
                await n.start(k)

            async def seen() -> bool:
                seen = [await n.see(k) for k in (0, 1)]
                return all(each["engine"]["up"] and [p["there"] for p in each["peers"]] == [True] for each in seen)

            await n.until(seen)
            assert [(await n.see(k))["url"] for k in (0, 1)] == n.urls

    play(scene)


def test_nodes_and_engines_at_ipv6_addresses() -> None:
    if not is_free("::1", 0):
        pytest.skip("this machine has no IPv6")  # as some containers; nothing can listen there

    async def scene() -> None:
        stub = Stub()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", stub.complete)
        app.router.add_get("/metrics", stub.metrics)
        app.router.add_get("/v1/models", stub.models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        engine = listen("::1", 0)
        await web.SockSite(runner, engine).start()
        try:
            async with net(Stub()) as n:
                await end(n)
                url = f"http://[::1]:{engine.getsockname()[1]}"
                settings = n.configs[0]
                settings |= {"host": "::1", "engine": settings["engine"] | {"url": url}}
                await n.start(0)
                n.urls[0] = f"http://[::1]:{settings['port']}"

                async def up() -> bool:
                    return bool((await n.see())["engine"]["up"])

                await n.until(up)
                assert (await n.see())["url"] == n.urls[0] and (await n.ask())[0] == 200
        finally:
            await runner.cleanup()

    play(scene)


def test_a_proxy_in_the_environment_is_not_asked_for_nodes() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            command = [sys.executable, "-m", "wwwserve.serving.cli", "status", "--json", n.urls[0]]
            proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
            process = await asyncio.create_subprocess_exec(
                *command, env=os.environ | proxies, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            out, err = await process.communicate()
            assert process.returncode == 0, err
            assert n.keys[0].name.encode() in out

    play(scene)


def test_status_names_the_policy_that_is_shipped() -> None:
    assert [node.policy_of(name).name for name in (None, "competitive", "cooperative", "single")] == [
        "competitive", "competitive", "cooperative", "single",
    ]  # fmt: skip


def test_calibrate_takes_the_url_that_clients_have(capsys: pytest.CaptureFixture[str]) -> None:
    async def scene() -> None:
        async with Stub().served() as stub:
            status = await asyncio.to_thread(cli.main, ["calibrate", stub.url + "/v1/"])
            assert status == 1

    play(scene)
    assert "/v1/models says of 'stub' no max_model_len" in capsys.readouterr().err  # it found the list of models
