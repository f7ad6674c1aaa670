"""The commands that set a node up: `init`, `join`, `card`, `doctor`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from wwwserve.agents.arguments import Count, File, Name
from wwwserve.agents.hardware import CHUNK_TOKENS
from wwwserve.serving import config
from wwwserve.serving.http.addresses import is_loopback
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.setup import doctor, init, join
from wwwserve.serving.setup.card import card_of

Urls = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="URL")]
NODE_FILE = Path("node.yaml")
NodeFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[NODE.YAML]")]


@dataclass
class Init:
    """Make a node's key, node.yaml and card; ask for what is missing."""

    file: NodeFile = NODE_FILE
    """the configuration; key and card are made beside it"""
    name: Name = None
    """what the node is called, for people"""
    engine: Urls = ()
    """of the engine, vLLM or SGLang; again for each of several that are alike"""
    kind: Literal["vllm", "sglang"] = "vllm"
    """names of the engine's metrics"""
    engine_key: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """API key that the engine wants"""
    calibrate: bool = False
    """measure the engine, which should have nothing else to do"""
    repeats: Count = 3
    """measurements of each load, each takes about a minute"""
    kv_tokens: Count | None = None
    """tokens that its KV cache holds; needed to measure SGLang, vLLM says it"""
    max_batched_tokens: Count = CHUNK_TOKENS
    """tokens that it computes in one iteration at most, which it does not say"""
    gpu: Name = None
    """take the engine's profile from the catalogue instead, see `wwwserve hardware`"""
    model: Name = None
    """its model there; default: what the engine serves, if that is listed"""
    max_num_seqs: Count = 256
    """requests at once in the engine, with --gpu"""
    url: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS|URL")] = None
    """at which peers reach this machine; default: they are on it"""
    host: Name = None
    """where the node listens; default: everywhere, where --url is no address of this machine alone"""
    port: int | None = None
    """at which it listens; default: the first free one from 9000"""
    tls: bool = False
    """nodes speak TLS with each other; all of a network need it"""

    def run(self) -> int:
        wanted = init.Wanted(**{name: getattr(self, name) for name in init.Wanted._fields})
        asked = init.on_terminal if init.is_terminal() else None
        made = init.init(self.file, wanted, asked, lambda line: print(line, file=sys.stderr))
        print(f"{made.key}  its key, {'new' if made.key_is_new else 'which was there'}; show it to nobody")
        print(f"{self.file}  the configuration")
        print(f"{made.card_file}  the card, to be sent to your peers:\n")
        print(made.card.text())
        if not is_loopback(made.config.host):
            print("Whoever reaches this node may use it as your users do, until `keys` lists API keys.")
        print("Next, with what your peers send you:")
        print(f"  wwwserve join PEER.card.yaml{_option(self.file)}")
        print(f"  wwwserve node {self.file}")
        print(f"  wwwserve doctor{'' if self.file == NODE_FILE else f' {self.file}'}")
        return 0


@dataclass
class Join:
    """Take a peer's card: add it to the peers in node.yaml."""

    card: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CARD")]
    """file that the peer's operator sent"""
    config: Annotated[Path, tyro.conf.arg(metavar="NODE.YAML")] = NODE_FILE
    """the configuration that it is added to"""
    name: Name = None
    """what to call the peer; default: as it calls itself"""

    def run(self) -> int:
        done = join.join(self.config, self.card, self.name)
        print(done.said)
        for note in done.notes:
            print(f"  {note}")
        return 0


@dataclass
class ShowCard:
    """Print a node's card, which peers join."""

    file: NodeFile = NODE_FILE
    """the configuration"""
    replaces: File = None
    """file of the key that the node had before `key` was changed, which signs the card too, so that peers take it"""

    def run(self) -> int:
        node = config.load(self.file)
        before = Identity.load(self.replaces) if self.replaces is not None else None
        print(card_of(node, Identity.load(Path(node.key)), before).text(), end="")
        return 0


@dataclass
class Doctor:
    """Look for what is wrong with a node, and say what to do."""

    file: NodeFile = NODE_FILE
    """the configuration; the node may run or not"""
    json: bool = False
    """print what was found as JSON"""

    def run(self) -> int:
        found = doctor.examine(self.file)
        failed = sum(each.state == doctor.FAILED for each in found)
        if self.json:
            print(json.dumps({"failed": failed, "findings": [each._asdict() for each in found]}, indent=2))
            return int(failed > 0)
        for each in found:
            print(f"{each.state:<8} {each.what}: {_shown(each.found)}")
            if each.do:
                print(f"         to do: {_shown(each.do)}")
        warned = sum(each.state == doctor.WARNING for each in found)
        print(f"\n{failed} failed, {warned} warnings, {len(found) - failed - warned} ok")
        return int(failed > 0)


def _option(file: Path) -> str:
    return "" if file == NODE_FILE else f" --config {file}"


def _shown(text: str) -> str:
    """Without what could command a terminal: peers say some of it."""
    return "".join(c if c.isprintable() else "�" for c in text)
