"""Cards, and how `wwwserve join` writes a peer into node.yaml."""

import os
import stat
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest
import yaml
from stub_nodes import PROFILE, ZENOH

from wwwserve.agents import strict_yaml
from wwwserve.serving import cli, config
from wwwserve.serving.config import ConfigError
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.setup.card import Card, CardError, card_of, file_name, read_card
from wwwserve.serving.setup.join import join
from wwwserve.serving.setup.node_file import with_peer, with_url

A, B = (Identity.generate().name for _ in range(2))
PEER = {"name": "south", "key": B, "url": "http://10.0.0.2:9000"}
ENGINE = {"url": "http://127.0.0.1:8000", "profile": PROFILE}


def node(folder: Path, name: str, **more: Any) -> tuple[Path, Identity]:
    """A configuration with its key."""
    folder.mkdir(exist_ok=True)
    identity = Identity.generate()
    identity.save(folder / f"{name}.pem")
    file = folder / "node.yaml"
    file.write_text(yaml.safe_dump({"name": name, "key": f"{name}.pem", "engine": ENGINE} | more, sort_keys=False))
    return file, identity


def card(file: Path) -> Path:
    """The card of a configuration, in a file beside it."""
    own = config.load(file)
    written = file.parent / file_name(own.name)
    written.write_text(card_of(own, Identity.load(Path(own.key))).text())
    return written


def test_a_card_says_who_a_node_is_and_that_nothing_was_changed(tmp_path: Path) -> None:
    file, identity = node(tmp_path / "n", 'nørth: "1"', url="http://10.0.0.1:9000/")
    written = card(file)
    assert written.name == "nørth---1-.card.yaml"
    read = read_card(written)
    assert (read.name, read.key, read.url) == ('nørth: "1"', identity.name, "http://10.0.0.1:9000")
    assert read.certificate is None
    text = written.read_text()
    for old, new in (("10.0.0.1", "10.0.0.9"), ("nørth", "north"), (identity.name, A)):
        written.write_text(text.replace(old, new))
        with pytest.raises(CardError, match="it was changed after it was signed"):
            read_card(written)
    file, identity = node(tmp_path / "t", "t", url="https://10.0.0.1:9000", tls={})
    secured = card(file)
    assert len(read_card(secured).certificate or "") == 64
    secured.write_text(secured.read_text().replace("certificate: ", "certificate: 0"))
    with pytest.raises(CardError, match="changed after it was signed"):
        read_card(secured)


def test_what_is_no_card_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c"
    for text, message in (
        ("[", "is no card"), ("name: x", "missing required field"), ("x" * 5000, "more than 4096 bytes"),
        ("name: a\nname: b", "key 'name' twice"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(CardError, match=message):
            read_card(file)
    with pytest.raises(CardError, match="No such file"):
        read_card(tmp_path / "none")
    identity = Identity.generate()
    for url, message in (
        ("http://0.0.0.0:1", "nobody reaches it"),
        ("ftp://h", "expected http"),
        ("http://a@h", "url"),
    ):
        made = Card(name="n", key=identity.name, url=url, signature="")
        signature = urlsafe_b64encode(identity.sign(made.signed())).decode()
        file.write_text(Card(name="n", key=identity.name, url=url, signature=signature).text())
        with pytest.raises(CardError, match=message):
            read_card(file)
    unreachable, _ = node(tmp_path / "u", "u", host="0.0.0.0")
    with pytest.raises(ConfigError, match="url must be given where host is"):
        card(unreachable)


BLOCK = """# of mine
name: north  # a comment

peers:  # ours
    # the first
    - {key: K1, url: "http://a:1"}   # kept
    - key: K2
      url: 'http://b:1'  # at the end

# what follows
port: 9000
"""
ITEM = f'- {{name: south, key: {B if B[0].isalpha() else chr(34) + B + chr(34)}, url: "http://10.0.0.2:9000"}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: north\n", f"name: north\npeers:\n  {ITEM}\n"),
        ("name: north", f"name: north\npeers:\n  {ITEM}\n"),
        ("peers:  # none yet\nport: 1\n", f"peers:\n  {ITEM}  # none yet\nport: 1\n"),
        ("peers: ~ # none\nport: 1\n", f"peers: [{ITEM[2:]}] # none\nport: 1\n"),
        ("peers: []   # none\nport: 1\n", f"peers: [{ITEM[2:]}]   # none\nport: 1\n"),
        ("peers: [{key: K, url: u}]  # one\n", f"peers: [{{key: K, url: u}}, {ITEM[2:]}]  # one\n"),
        ("peers:\n- {key: K, url: u}\nport: 1\n", f"peers:\n- {{key: K, url: u}}\n{ITEM}\nport: 1\n"),
        ("peers:\n- {key: K, url: u}", f"peers:\n- {{key: K, url: u}}\n{ITEM}\n"),
        (
            "peers:\r\n  - {key: K, url: u}\r\nport: 1\r\n",
            f"peers:\r\n  - {{key: K, url: u}}\r\n  {ITEM}\r\nport: 1\r\n",
        ),
        ('{"name": "n"}', f'{{"name": "n", peers: [{ITEM[2:]}]}}'),
        (BLOCK, BLOCK.replace("# at the end\n", f"# at the end\n    {ITEM}\n")),
    ],
)
def test_a_peer_is_added_and_all_else_stays_as_it_is_written(text: str, expected: str) -> None:
    assert with_peer(text, PEER) == expected
    before, after = strict_yaml.load(text), strict_yaml.load(expected)
    assert after == before | {"peers": [*(before.get("peers") or []), PEER]}


def test_another_url_is_put_where_the_old_one_stands() -> None:
    assert with_url(BLOCK, "K2", "http://c:1") == BLOCK.replace("'http://b:1'", '"http://c:1"')
    assert with_url(BLOCK, "K1", "http://c:1") == BLOCK.replace('"http://a:1"', '"http://c:1"')


def test_a_file_that_cannot_be_edited_is_left_with_what_to_do() -> None:
    for text in ("a: &x [{key: K, url: u}]\npeers: *x\n", "name: n\n...\n"):
        with pytest.raises(ConfigError, match="add by hand peers: "):
            with_peer(text, PEER)


def test_join_is_atomic_and_may_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    north, _ = node(tmp_path / "north", "north")
    south, identity = node(tmp_path / "south", "south", port=9001)
    north.write_text("# mine\n" + north.read_text())
    north.chmod(0o640)
    link = tmp_path / "north" / "link.yaml"
    link.symlink_to(north)
    before = north.read_text()
    assert cli.main(["join", str(card(south)), "--config", str(link)]) == 0
    assert "south is a peer now, at http://127.0.0.1:9001" in capsys.readouterr().out
    [peer] = config.load(north).peers
    assert (peer.name, peer.key, peer.url) == ("south", identity.name, "http://127.0.0.1:9001")
    assert north.read_text().startswith(before) and link.is_symlink()
    assert stat.S_IMODE(north.stat().st_mode) == 0o640
    assert sorted(os.listdir(north.parent)) == ["link.yaml", "node.yaml", "north.pem"]
    once = north.read_bytes()
    assert not join(north, card(south)).changed and north.read_bytes() == once
    south.write_text(south.read_text().replace("9001", "9002"))
    moved = join(north, card(south))
    assert moved.said == "south has moved from http://127.0.0.1:9001 to http://127.0.0.1:9002"
    assert [each.url for each in config.load(north).peers] == ["http://127.0.0.1:9002"]


def test_another_key_is_not_taken_in_silence(tmp_path: Path) -> None:
    north, _ = node(tmp_path / "north", "north")
    south, first = node(tmp_path / "south", "south", port=9001)
    impostor, second = node(tmp_path / "impostor", "south", port=9003)
    join(north, card(south))
    before = north.read_bytes()
    with pytest.raises(CardError, match=f"has south with another key, {first.name}, and this card has {second.name}"):
        join(north, card(impostor))
    impostor.write_text(impostor.read_text().replace("9003", "9001"))
    with pytest.raises(CardError, match=r"has another key, .* at http://127\.0\.0\.1:9001"):
        join(north, card(impostor), "elsewhere")
    assert north.read_bytes() == before
    impostor.write_text(impostor.read_text().replace("9001", "9003"))
    assert join(north, card(impostor), "south-2").said == "south-2 is a peer now, at http://127.0.0.1:9003"


@pytest.mark.parametrize(
    ("own", "theirs", "message"),
    [
        ({"membership": ZENOH}, {}, "zenoh, which finds peers itself"),
        ({"tls": {}}, {}, "this node has `tls`, and south at http://127.0.0.1:9002 has not"),
        ({}, {"tls": {}}, "south has `tls`, and this node has not"),
        ({"url": "http://10.0.0.1:9000"}, {}, "is south's machine only for itself"),
        ({"port": 9001}, {"port": 9001}, "this node is at http://127.0.0.1:9001 itself"),
    ],
)
def test_a_card_that_would_not_work_is_refused_with_the_reason(
    own: dict[str, Any], theirs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    north, _ = node(tmp_path / "north", "north", **own)
    south, _ = node(tmp_path / "south", "south", **{"port": 9002} | theirs)
    with pytest.raises(CardError, match=message):
        join(north, card(south))


def test_the_own_card_is_for_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    north, _ = node(tmp_path / "north", "north")
    assert cli.main(["join", str(card(north)), "--config", str(north)]) == 1
    assert "the node's own card" in capsys.readouterr().err
    assert cli.main(["card", str(north)]) == 0
    assert capsys.readouterr().out == (tmp_path / "north" / "north.card.yaml").read_text()


def test_join_says_what_else_there_is_to_do(tmp_path: Path) -> None:
    limits = {"file": "n.db", "limits": {A: {"ours": 1, "theirs": 1}}}
    north, _ = node(tmp_path / "north", "north", trust=[A], ledger=limits)
    south, _ = node(tmp_path / "south", "south", url="http://10.0.0.2:9000")
    said = " ".join(join(north, card(south)).notes)
    for part in ("cannot reach this node at http://127.0.0.1:9000", "`trust` does not list", "`ledger.limits` has no"):
        assert part in said


def test_a_new_key_is_taken_where_the_old_one_has_signed_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    north, old = node(tmp_path / "north", "north", url="http://10.0.0.1:9000")
    south, _ = node(tmp_path / "south", "south", url="http://10.0.0.2:9000")
    join(south, card(north), "up there")
    assert cli.main(["key", "new", str(north.parent / "next.pem")]) == 0
    north.write_text(north.read_text().replace("key: north.pem", "key: next.pem"))
    new = Identity.load(north.parent / "next.pem")

    alone = card(north)  # anyone could have made it
    with pytest.raises(CardError, match="has another key"):
        join(south, alone)

    capsys.readouterr()
    signed = tmp_path / "signed.card.yaml"
    assert cli.main(["card", str(north), "--replaces", str(north.parent / "north.pem")]) == 0
    signed.write_text(capsys.readouterr().out)
    text = signed.read_text()
    for forged in (
        text.replace(old.name, A),  # the key of somebody else
        "\n".join(line for line in text.splitlines() if not line.startswith("replaces_signature")),
        "\n".join(line for line in text.splitlines() if not line.startswith("replaces:")),
    ):
        signed.write_text(forged)
        with pytest.raises(CardError):
            join(south, signed)
    signed.write_text(text)
    assert cli.main(["join", str(signed), "--config", str(south)]) == 0
    said = capsys.readouterr().out
    assert "has a new key" in said and "needs your card" not in said
    (peer,) = config.load(south).peers
    assert (peer.name, peer.key, peer.url) == ("up there", new.name, "http://10.0.0.1:9000")
    assert not join(south, signed).changed
