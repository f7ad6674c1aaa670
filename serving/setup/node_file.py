"""Write a peer into `node.yaml` and leave all else as it stands: comments, order, quotes, spaces.

PyYAML tells where in the text each value lies; what is new is put there. What comes out is read again before it is
written, and has to say what was there and the peer.
"""

import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from wwwserve.agents import strict_yaml
from wwwserve.serving.config import ConfigError

Peer = dict[str, str]


def with_peer(text: str, peer: Peer) -> str:
    """The file's text with one more of its `peers`. Raises ConfigError for a file that has to be edited by hand."""

    def listed(content: dict[str, Any]) -> None:
        content["peers"] = [*(content.get("peers") or []), peer]

    return _checked(text, _insert(text, _flow(peer)), listed, f"peers: - {_flow(peer)}")


def with_url(text: str, key: str, url: str) -> str:
    """The file's text with another `url` of the peer of that public key. Raises ConfigError as `with_peer`."""
    return _with(text, key, "url", url)


def with_key(text: str, key: str, new: str) -> str:
    """The file's text with another `key` of the peer of that public key. Raises ConfigError as `with_peer`."""
    return _with(text, key, "key", new)


def _with(text: str, key: str, field: str, said: str) -> str:
    def change(content: dict[str, Any]) -> None:
        content["peers"] = [each | {field: said} if each["key"] == key else each for each in content["peers"]]

    changed = text
    for item in _peers(text).value:
        fields = {name.value: value for name, value in item.value}
        if fields["key"].value == key:
            changed = _replaced(text, fields[field], _scalar(said))
    return _checked(text, changed, change, f"the {field} of {key}: {said}")


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all, with the mode that it has. Raises OSError."""
    real = path.resolve()
    part = real.with_name(f".{real.name}.{secrets.token_hex(8)}")
    try:
        with part.open("x", encoding="utf-8", newline="") as out:
            os.fchmod(out.fileno(), real.stat().st_mode & 0o7777)
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        part.replace(real)
    finally:
        part.unlink(missing_ok=True)


def _checked(old: str, new: str, change: Callable[[dict[str, Any]], None], what: str) -> str:
    """`new`, which has to say what `old` does after the change. Raises ConfigError for what to do by hand."""
    expected = strict_yaml.load(old)
    change(expected)
    try:
        good = strict_yaml.load(new) == expected
    except yaml.YAMLError:
        good = False
    if not good:
        raise ConfigError(f"the file is written in a way that cannot be kept: add by hand {what}")
    return new


def _peers(text: str) -> Any:
    """The node of the value of `peers`, or None."""
    return next((value for key, value in _root(text).value if key.value == "peers"), None)


def _root(text: str) -> Any:
    """The node of a whole file, which is a mapping."""
    return yaml.compose(text, yaml.SafeLoader)


def _insert(text: str, item: str) -> str:
    """The text with `item` as the last of `peers`."""
    root, peers = _root(text), _peers(text)
    newline = "\r\n" if "\r\n" in text else "\n"
    if peers is None and root.flow_style:
        return _put(text, _end(root.value[-1][1]), f", peers: [{item}]")
    if peers is None:
        return text + ("" if text.endswith("\n") else newline) + f"peers:{newline}  - {item}{newline}"
    if isinstance(peers, yaml.ScalarNode):
        if peers.start_mark.index == peers.end_mark.index:  # nothing stands there
            return _put(text, peers.start_mark.index, f"{newline}  - {item}")
        return _replaced(text, peers, f"[{item}]")
    if peers.flow_style:
        return _put(text, _end(peers.value[-1]), f", {item}") if peers.value else _replaced(text, peers, f"[{item}]")
    line_end = text.find("\n", max(_end(peers.value[-1]) - 1, 0))
    text, line_end = (text, line_end + 1) if line_end >= 0 else (text + newline, len(text + newline))
    return _put(text, line_end, f"{' ' * peers.start_mark.column}- {item}{newline}")


def _end(node: Any) -> int:
    """Where in the text a value ends; of one in block style PyYAML says where the next one begins."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(last, tuple) else last)


def _put(text: str, at: int, new: str) -> str:
    return text[:at] + new + text[at:]


def _replaced(text: str, node: Any, new: str) -> str:
    return text[: node.start_mark.index] + new + text[node.end_mark.index :]


def _flow(peer: Peer) -> str:
    return "{" + ", ".join(f"{name}: {_scalar(said)}" for name, said in peer.items()) + "}"


def _scalar(said: str) -> str:
    """As a person would write it, in quotes where it needs them."""
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", said) and strict_yaml.load(said) == said
    return said if plain else json.dumps(said, ensure_ascii=False)
