"""`wwwserve init` and `wwwserve doctor`, and `status` by a configuration."""

import asyncio
import json
import re
import socket
import stat
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from stub_nodes import PROFILE, ZENOH, Stub, net, play

from wwwserve.agents.hardware import profile
from wwwserve.serving import cli, config
from wwwserve.serving.engine import calibrate
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.setup import doctor, init
from wwwserve.serving.setup.card import read_card
from wwwserve.serving.setup.doctor import FAILED, OK, WARNING, Finding, examine
from wwwserve.serving.setup.init import Wanted
from wwwserve.serving.setup.look import catalogue_model, own_network

GPU = ["--gpu", "rtx-4090", "--model", "qwen3-8b"]
NOWHERE = "http://127.0.0.1:9"


def run(*argv: str) -> int:
    return cli.main(["init", *argv])


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "is_terminal", lambda: False)


@pytest.fixture
def beside_an_engine() -> Callable[[Stub, Callable[[str], Any]], Any]:
    """Calls with the URL of a stub engine, from a thread of its own."""

    def call(stub: Stub, what: Callable[[str], Any]) -> Any:
        async def scene() -> Any:
            async with stub.served():
                return await asyncio.to_thread(what, stub.url)

        return asyncio.run(scene())

    return call


def test_without_a_terminal_what_is_missing_is_named(
    no_terminal: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "node.yaml")
    for argv, message in (
        ([], "needs --name, --engine, --calibrate or --gpu: there is no terminal"),
        (["--name", "n", "--engine", NOWHERE], "needs --calibrate or --gpu"),
        (["--name", "n", "--engine", "h:1", *GPU], "--engine is 'h:1', expected http://HOST:PORT"),
        (["--name", "n", "--engine", NOWHERE, "--calibrate"], "needs the engine, which does not answer"),
        (["--name", "n", "--engine", NOWHERE, "--calibrate", *GPU], "takes one of --calibrate and --gpu"),
        (["--name", "n", "--engine", NOWHERE, "--gpu", "rtx-4090"], "--model is needed with --gpu"),
        (["--name", "n", "--engine", NOWHERE, "--gpu", "abacus", "--model", "qwen3-8b"], "unknown gpu 'abacus'"),
        (["--name", "n", "--engine", NOWHERE, *GPU, "--port", "70000"], "--port is 70000, expected 1 to 65535"),
        (["--name", "n", "--engine", NOWHERE, *GPU, "--url", "h:x"], "--url is 'h:x', expected an address"),
        (
            ["--name", "n", "--engine", NOWHERE, *GPU, "--url", "http://h:1?x"],
            "the arguments make no node: every node's url must be",
        ),
        (["--name", "n" * 65, "--engine", NOWHERE, *GPU], "expected 1 to 64 printable characters"),
        (["--name", "n", "--engine", NOWHERE, *GPU, "--tls", "--url", "http://h:1"], "expected https:// with --tls"),
    ):
        assert run(file, *argv) == 2
        said = capsys.readouterr().err
        assert message in said and str(file) not in said  # which is not there
    assert list(tmp_path.iterdir()) == []


def test_init_makes_key_configuration_and_card(
    no_terminal: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "node.yaml"
    argv = [str(file), "--name", "north", "--engine", NOWHERE + "/v1/", *GPU, "--max-num-seqs", "64"]
    assert run(*argv, "--url", "10.0.0.1") == 0
    out = capsys.readouterr().out
    made, key = config.load(file), tmp_path / "north.pem"
    assert (made.host, made.url, made.engine.url) == ("0.0.0.0", f"http://10.0.0.1:{made.port}", NOWHERE)
    assert made.engine_profile() == profile("rtx-4090", "qwen3-8b", 64)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    card = read_card(tmp_path / "north.card.yaml")
    assert (card.name, card.key, card.url) == ("north", Identity.load(key).name, made.url)
    assert f"wwwserve join PEER.card.yaml --config {file}" in out and card.text() in out
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    assert run(*argv) == 1 and "is there already" in capsys.readouterr().err
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before
    file.unlink()
    assert run(*argv, "--tls", "--url", "[fd00::1]") == 0  # with the key that is there
    assert "which was there" in capsys.readouterr().out and key.read_bytes() == before[key]
    again = config.load(file)
    assert (again.host, again.url) == ("::", f"https://[fd00::1]:{again.port}") and again.tls is not None
    assert read_card(tmp_path / "north.card.yaml").certificate is not None
    file.unlink()
    assert run(*argv, "--url", "::1") == 0
    again = config.load(file)
    assert (again.host, again.url) == ("::1", f"http://[::1]:{again.port}")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("10.0.0.1", "http://10.0.0.1:9000"), ("10.0.0.1:80", "http://10.0.0.1:80"), ("node.example", "http://node.example:9000"),
        ("fd00::1", "http://[fd00::1]:9000"), ("[fd00::1]", "http://[fd00::1]:9000"),
        ("[fd00::1]:80", "http://[fd00::1]:80"), ("https://h/path/", "https://h/path"),
    ],
)  # fmt: skip
def test_an_address_may_lack_what_is_known(given: str, url: str) -> None:
    assert init._whole(given, 9000, tls=False) == url


def test_a_port_in_use_is_passed_over_or_named(
    no_terminal: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        argv = ["--name", "n", "--engine", NOWHERE, *GPU]
        assert run(str(tmp_path / "a.yaml"), *argv, "--port", str(port)) == 2
        assert f"--port is {port}, which is in use" in capsys.readouterr().err
        monkeypatch.setattr(init, "FIRST_PORT", port)
        assert run(str(tmp_path / "a.yaml"), *argv) == 0
        assert port < config.load(tmp_path / "a.yaml").port < port + init.PORTS


def test_on_a_terminal_it_asks_for_what_is_missing(tmp_path: Path, beside_an_engine: Any) -> None:
    answers = {"Name": "north", "Measure": "no", "GPU": "rtx-4090", "Its model": "", "Address": "local"}
    asked: list[str] = []

    def ask(question: str, default: str) -> str:
        [answer] = [said for begun, said in answers.items() if question.startswith(begun)]
        asked.append(question.split()[0])
        return answer or default

    def make(url: str) -> init.Made:
        return init.init(tmp_path / "node.yaml", Wanted(engine=(url,)), ask, lambda line: None)

    made = beside_an_engine(Stub(models_served=["meta/Meta-Llama-3-8B"]), make)
    assert asked == ["Name", "Measure", "GPU", "Its", "Address"]
    assert (made.config.name, made.config.url, made.config.engine_profile()) == (
        "north", None, profile("rtx-4090", "llama-3-8b", 256),
    )  # fmt: skip


def test_a_measured_profile_is_written(
    no_terminal: None, tmp_path: Path, beside_an_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    measured = profile("rtx-3090", "qwen3-8b", 8)

    async def measure(url: str, settings: Any, say: Any) -> calibrate.Calibration:
        seen.append((url, settings.repeats, settings.kv_tokens, settings.max_batched_tokens, settings.key))
        return calibrate.Calibration(url, "stub", measured, 0.0, {}, [])

    monkeypatch.setattr(calibrate, "calibrate", measure)
    file = tmp_path / "node.yaml"
    stub = Stub()
    argv = ["--name", "n", "--calibrate", "--repeats", "2", "--kv-tokens", "4096", "--max-batched-tokens", "512"]
    argv += ["--engine-key", "secret"]
    assert beside_an_engine(stub, lambda url: run(str(file), *argv, "--engine", url)) == 0
    assert seen == [(stub.url, 2, 4096, 512, "secret")]
    assert config.load(file).engine.key == "secret" and stat.S_IMODE(file.stat().st_mode) == 0o600
    found = config.load(file).engine_profile()
    assert (found.kv_blocks, found.max_num_seqs) == (measured.kv_blocks, 8)
    assert found.weight_s == pytest.approx(measured.weight_s, rel=1e-4)


def test_an_engine_that_cannot_be_measured_leaves_nothing(
    no_terminal: None, tmp_path: Path, beside_an_engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(tmp_path / "node.yaml"), "--name", "n", "--calibrate", "--engine"]
    assert beside_an_engine(Stub(), lambda url: run(*argv, url)) == 1
    assert "no max_model_len" in (said := capsys.readouterr().err) and "by --gpu, see `wwwserve hardware`" in said
    assert list(tmp_path.iterdir()) == []


def test_a_profile_of_another_model_than_the_engine_serves_is_named(
    no_terminal: None, tmp_path: Path, beside_an_engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for served, named in (("meta-llama/Meta-Llama-3-8B", True), ("Qwen/Qwen3-8B", False), ("mine", False)):
        file = tmp_path / f"{served.rpartition('/')[2]}.yaml"
        argv = [str(file), "--name", "n", "--url", "http://10.0.0.1", *GPU]
        stub = Stub(models_served=[served])
        assert beside_an_engine(stub, lambda url, argv=argv: run(*argv, "--engine", url)) == 0
        said = capsys.readouterr().err
        assert ("the profile is of qwen3-8b, and the engine serves" in said) is named
        assert ("--model llama-3-8b" in said) is named


def test_served_names_tell_models_of_the_catalogue() -> None:
    assert [catalogue_model(each) for each in ("Qwen/Qwen3-8B", "meta-llama/Meta-Llama-3-8B-Instruct", "gpt")] == [
        "qwen3-8b", "llama-3-8b", None,
    ]  # fmt: skip


def found(file: Path) -> dict[str, Finding]:
    """What doctor finds, by what it looked at."""
    return {each.what: each for each in examine(file)}


def write(file: Path, **settings: Any) -> Path:
    """A node's configuration with its key, changed by `settings`."""
    key = file.parent / "n.pem"
    if not key.exists():
        Identity.generate().save(key)
    whole = {"name": "n", "key": "n.pem", "port": 0, "engine": {"url": NOWHERE, "profile": PROFILE}}
    file.write_text(yaml.safe_dump(whole | settings))
    return file


def test_doctor_sees_a_healthy_pair_and_what_parts_it(tmp_path: Path) -> None:
    async def scene() -> None:
        async with net(Stub(), Stub()) as n:
            files = []
            for k, settings in enumerate(n.configs):
                files.append(tmp_path / f"{k}.yaml")
                files[k].write_text(yaml.safe_dump(settings | {"serves": ["stub"]}))

            async def look(k: int = 0) -> dict[str, Finding]:
                return await asyncio.to_thread(found, files[k])

            well = await look()
            assert {each.what: each.state for each in well.values() if each.state != OK} == {}
            assert "which runs" in well["port"].found and "it lists this node" in well["peer"].found

            async def changed(**more: Any) -> Finding:
                files[0].write_text(yaml.safe_dump(n.configs[0] | more))
                return (await look())["peer"]

            moved = await changed(url="http://127.0.0.1:1")
            assert moved.state == FAILED and "at another url" in moved.found and "wwwserve card" in moved.do
            other = tmp_path / "other.pem"
            Identity.generate().save(other)
            stranger = await changed(key=str(other))
            assert stranger.state == FAILED and "does not list this node" in stranger.found
            gone = await changed(peers=[{"key": n.keys[1].name, "url": "http://127.0.0.1:9", "name": "south"}])
            assert gone.state == FAILED and gone.found.startswith("south at http://127.0.0.1:9: it does not answer")
            itself = await changed(peers=[{"key": n.keys[1].name, "url": n.urls[0]}])
            assert itself.state == FAILED and "it is this node" in itself.found
            engine = await changed(peers=[{"key": n.keys[1].name, "url": n.stubs[0].url}])
            assert engine.state == FAILED and "does not answer as a node does" in engine.found
            await changed()
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)
            await n.start(1, lambda: time.time() + 100.0)
            late = (await look())["peer"]
            assert late.state == FAILED and re.search(r"its clock is (99|100|101) s ahead", late.found)
            # None of it counted for anything but what it was refused for.
            assert (await n.see(1))["requests"]["accepted"] == 0

    play(scene)


def test_doctor_names_both_limits_where_two_nodes_differ(tmp_path: Path) -> None:
    async def scene() -> None:
        async with net(Stub(), Stub()) as n:

            async def restarted(k: int, ours: float, theirs: float) -> None:
                n.running[k].cancel()
                await asyncio.gather(n.running[k], return_exceptions=True)
                limits = {n.keys[1 - k].name: {"ours": ours, "theirs": theirs}}
                n.configs[k]["ledger"] = {"file": str(tmp_path / f"{k}.db"), "limits": limits}
                (tmp_path / f"{k}.yaml").write_text(yaml.safe_dump(n.configs[k]))
                await n.start(k)

            async def credit(k: int) -> list[Finding]:
                seen = await asyncio.to_thread(examine, tmp_path / f"{k}.yaml")
                return [each for each in seen if each.what == "credit"]

            async def told(k: int, *words: str) -> bool:
                found = await credit(k)
                if found:
                    assert [each.state for each in found] == [WARNING] and "correct `ledger.limits`" in found[0].do
                return bool(found) and all(each in found[0].found for each in words)

            async def opened() -> bool:
                return all([(await n.see(k))["ledger"]["channels"] for k in range(2)])

            await restarted(0, 20.0, 50.0)
            await restarted(1, 30.0, 20.0)  # it should be 50 and 20
            await n.until(lambda: told(0, "no channel is open", "has ours 30, theirs 20", "here ours 20, theirs 50"))
            await n.until(lambda: told(1, "no channel is open", "has ours 20, theirs 50", "here ours 30, theirs 20"))
            await restarted(1, 50.0, 20.0)
            await n.until(opened)
            assert await credit(0) == await credit(1) == []
            await restarted(1, 60.0, 20.0)  # raised on one side
            await n.until(lambda: told(1, "no credit is added", "has ours 20, theirs 50", "here ours 60, theirs 20"))
            assert await told(0, "no credit is added", "it asks for 20 credits in all for this node and 60 for itself")
            await restarted(0, 20.0, 60.0)

            async def added() -> bool:
                return all([(await n.see(k))["ledger"]["channels"][0]["refills"] == 1 for k in range(2)])

            await n.until(added)
            assert await credit(0) == await credit(1) == []

    play(scene)


def test_doctor_and_status_speak_tls_with_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scene() -> None:
        async with net(Stub(), Stub(), tls={}) as n:
            file = tmp_path / "node.yaml"
            file.write_text(yaml.safe_dump(n.configs[0]))
            well = await asyncio.to_thread(found, file)
            assert {each.what: each.state for each in well.values() if each.state != OK} == {}
            assert well["certificate"].found == "the node's own, of its key"
            assert await asyncio.to_thread(cli.main, ["status", "--json", "--config", str(file)]) == 0
            assert json.loads(capsys.readouterr().out)["key"] == n.keys[0].name
            key = Identity.generate()
            file.write_text(yaml.safe_dump(n.configs[0] | {"peers": [{"key": key.name, "url": n.urls[1]}]}))
            other = (await asyncio.to_thread(found, file))["peer"]
            assert other.state == FAILED and "another key than it is listed with" in other.found
            # The node of another key is not taken for this one.
            file.write_text(yaml.safe_dump(n.configs[0] | {"port": n.configs[1]["port"]}))
            assert await asyncio.to_thread(cli.main, ["status", "--config", str(file)]) == 1
            assert "does not answer as this node" in capsys.readouterr().err
            port = (await asyncio.to_thread(found, file))["port"]
            assert port.state == FAILED and "is in use, and not by this node" in port.found

    play(scene)


def test_status_by_a_configuration_asks_the_admin_listener(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
        async with net(Stub()) as n:
            n.running[0].cancel()
            await asyncio.gather(*n.running, return_exceptions=True)
            n.configs[0]["admin"] = {"port": port, "key": "secret"}
            await n.start(0)
            file = tmp_path / "node.yaml"
            file.write_text(yaml.safe_dump(n.configs[0]))
            seen = await asyncio.to_thread(own_network, config.load(file))
            assert seen["key"] == n.keys[0].name and seen["policy"] == "earliest_finish"
            for url, hint in (
                (n.urls[0], "a node with `admin` shows itself there alone"),
                (f"http://127.0.0.1:{port}", "--key"),
            ):
                assert await asyncio.to_thread(cli.main, ["status", url]) == 1
                said = capsys.readouterr().err
                assert hint in said and "--config" in said

    play(scene)
    assert cli.main(["status", "http://127.0.0.1:1", "--config", str(tmp_path / "node.yaml")]) == 2
    assert "--config says URL and key" in capsys.readouterr().err


def test_doctor_names_what_is_wrong_with_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "node.yaml"
    assert cli.main(["doctor", str(file)]) == 1
    assert "wwwserve init" in capsys.readouterr().out
    file.write_text("name: [")
    assert found(file)["configuration"].state == FAILED
    write(file, key="none.pem")
    assert found(file)["key"].do == f"wwwserve key new {tmp_path / 'none.pem'}"
    write(file)
    (tmp_path / "n.pem").chmod(0o644)
    key = found(file)["key"]
    assert key.state == FAILED and key.do == f"chmod 600 {tmp_path / 'n.pem'}"
    (tmp_path / "n.pem").chmod(0o600)
    assert cli.main(["doctor", "--json", str(file)]) == 1
    said = json.loads(capsys.readouterr().out)
    states = {each["what"]: each["state"] for each in said["findings"]}
    assert said["failed"] == 1 and states["engine"] == FAILED and states["peers"] == WARNING
    (tmp_path / "bundle").mkdir()
    write(file, policy="bundle", ledger={"file": "n.db", "limits": {}, "genesis": "genesis.yaml"})
    (tmp_path / "genesis.yaml").write_text("accounts: {}")
    wrong = found(file)
    assert wrong["policy"].state == wrong["ledger"].state == FAILED
    assert "which is this node" in wrong["ledger"].found
    (tmp_path / "n.db").write_text("no journal")
    (tmp_path / "genesis.yaml").write_text(f"accounts: {{{Identity.load(tmp_path / 'n.pem').name}: {{credit: 1}}}}")
    assert found(file)["ledger"].state == FAILED and "n.db" in found(file)["ledger"].found
    (tmp_path / "n.db").unlink()
    assert found(file)["ledger"].state == OK
    write(file, membership=ZENOH)
    assert found(file)["peers"] == Finding("peers", OK, "are found by zenoh, once the node runs")
    peer = {"key": Identity.generate().name, "url": NOWHERE, "name": "south"}
    write(file, peers=[peer], ledger={"file": "n.db", "limits": {peer["key"]: {"ours": 1, "theirs": 1}}})
    assert found(file)["ledger"].state == OK
    write(file, peers=[peer], ledger={"file": "n.db", "genesis": "genesis.yaml"})
    assert found(file)["ledger"].found == "south was granted nothing, so nothing is traded with it"


def test_doctor_names_aliases_of_models_that_are_not_there(tmp_path: Path, beside_an_engine: Any) -> None:
    file = tmp_path / "node.yaml"

    def look(url: str) -> dict[str, Finding]:
        write(file, engine={"url": url, "profile": PROFILE}, aliases={"gpt-4": "stub", "gpt-5": "lora"})
        return found(file)

    seen = beside_an_engine(Stub(), look)["aliases"]
    assert seen.state == WARNING and seen.found == "gpt-5 for lora, which the engine does not serve"
    assert "aliases" not in beside_an_engine(Stub(models_served=["stub", "lora"]), look)


def test_doctor_compares_engine_and_profile(tmp_path: Path, beside_an_engine: Any) -> None:
    file = tmp_path / "node.yaml"

    def with_engine(stub: Stub, **engine: Any) -> dict[str, Finding]:
        def look(url: str) -> dict[str, Finding]:
            write(file, serves=["stub"], engine={"url": url, "profile": PROFILE} | engine)
            return found(file)

        seen: dict[str, Finding] = beside_an_engine(stub, look)
        return seen

    well = with_engine(Stub())
    assert {well[each].state for each in ("engine", "metrics", "profile")} == {OK} and "models" not in well
    assert with_engine(Stub(says_load=False))["metrics"].state == WARNING
    assert with_engine(Stub(), kind="sglang")["metrics"].state == WARNING
    other = with_engine(Stub(models_served=["Meta-Llama-3-8B"]))
    assert other["models"].state == FAILED and "`serves` has stub" in other["models"].found
    assert other["profile"].state == FAILED and "serves Meta-Llama-3-8B" in other["profile"].found
    measured = {
        "kind": "measured", "weight_s": 0.01, "per_seq_s": 1e-4, "per_kv_token_s": 1e-8, "prefill_base_s": 0.01,
        "per_token_s": 1e-5, "kv_blocks": 1000, "max_num_seqs": 8, "max_batched_tokens": 2048, "max_model_len": 4096,
        "source": "measured: another, 50 loads",
    }  # fmt: skip
    assert with_engine(Stub(), profile=measured)["profile"].state == FAILED


def test_doctor_knows_certificates_that_end_and_proxies_and_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ca = tmp_path / "node.yaml", trustme.CA()
    for ends, state in ((timedelta(days=90), OK), (timedelta(days=3), WARNING), (timedelta(days=-1), FAILED)):
        made = ca.issue_cert(
            "node.example", not_after=datetime.now(UTC) + ends, not_before=datetime(2020, 1, 1, tzinfo=UTC)
        )
        made.private_key_pem.write_to_path(tmp_path / "c.key")
        made.cert_chain_pems[0].write_to_path(tmp_path / "c.pem")
        write(file, url="https://node.example:1", tls={"certificate": "c.pem", "key": "c.key"})
        assert found(file)["certificate"].state == state
    (tmp_path / "c.key").write_text("none")
    assert found(file)["certificate"].state == FAILED
    peer = {"key": Identity.generate().name, "url": "http://10.0.0.2:9000"}
    monkeypatch.setattr(doctor, "ask", _unreached)
    assert found(write(file, port=1, peers=[peer]))["url"].state == FAILED
    assert found(write(file, url="http://10.0.0.1:9000"))["url"].state == WARNING
    assert found(write(file, host="0.0.0.0", url="http://10.0.0.1:9000"))["url"].state == OK
    assert found(file)["users"].state == WARNING
    assert "users" not in found(write(file, host="0.0.0.0", url="http://10.0.0.1:9000", keys=["k"]))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert found(file)["proxy"].state == OK
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert found(file)["proxy"].state == WARNING
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert found(file)["proxy"].state == OK
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda what: (256, 1024))
    limit = found(file)["file descriptors"]
    assert limit.state == WARNING and "LimitNOFILE=8256" in limit.do


async def _unreached(*given: Any) -> doctor.Answer:
    return doctor.Answer(doctor.View.UNREACHABLE, "no way")


def test_what_peers_say_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(doctor, "examine", lambda file: [Finding("peer", FAILED, "\x1b[2Jgone", "\x07")])
    assert cli.main(["doctor"]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_a_terminal_that_ends_is_no_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(init, "is_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    assert run("/tmp/nowhere-else.yaml") == 2
    assert "nobody answers" in capsys.readouterr().err
