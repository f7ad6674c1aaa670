"""The nodes of a soak: their configurations, certificates and processes, the last of them malicious."""

import asyncio
import ipaddress
import os
import random
import resource
import shutil
import signal
import sqlite3
import ssl
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from wwwserve.eval.live.soak.node_process import HONEST
from wwwserve.serving.local_nodes import Accounts, Command, NodeFiles, Process, Programs, local_urls, rss_mb

NODES = 5
MODEL, GPU, SPEED = "qwen3-8b", "rtx-4090", 10.0
EXPOSURE, STAKE, AT_STAKE = 3.0, 40.0, 2.0  # credits; of what a node may stake at most and stakes at a time
ACCOUNTS = Accounts(credit=400.0, stake=STAKE, exposure=EXPOSURE)
DUELS, JUDGES = 0.1, 2
SEEN_S = 5.0  # for a node to say how it is
LARGEST = resource.RLIM_INFINITY
EQUIVOCATOR = "equivocator"
KEPT_EACH = 5  # lives between two copies of its journal that the malicious node keeps
STRATEGIES = (
    "freeloader", "inflater", "staller", "liar", "forger", "replayer", "griefer", "robber", "withholder", "mixed",
)  # fmt: skip


def configured(k: int, port: int, engine: int, certificate: Path, key: Path) -> dict[str, Any]:
    """The configuration of node k before the engine at that port."""
    [url] = local_urls([engine])
    return {
        "name": f"n{k}", "port": port, "policy": "random", "seed": k, "stake": AT_STAKE,
        "tls": {"certificate": str(certificate), "key": str(key)},
        "engine": {
            "url": url, "timeout_s": 20.0,
            "profile": {"kind": "catalogue", "gpu": GPU, "model": MODEL, "max_num_seqs": 64},
        },
        "market": {
            "speed": SPEED, "gossip_s": 5.0, "tick_s": 2.0, "stake_rule": "fixed", "duel_probability": DUELS,
            "judges": JUDGES,
        },
        "log": "warning",
    }  # fmt: skip


def certified(folder: Path) -> tuple[Path, Path]:
    """An ordinary certificate for users, of this machine and by its own authority, and its private key, in files."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "soak")])
    now = datetime.now(UTC)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=30))
        .add_extension(here, critical=False).add_extension(x509.BasicConstraints(True, None), critical=True)
        .sign(key, SHA256())
    )  # fmt: skip
    files = folder / "users.pem", folder / "users.key"
    files[0].write_bytes(made.public_bytes(Encoding.PEM))
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def users_context(certificate: Path) -> ssl.SSLContext:
    """By which users check the nodes' certificate."""
    return ssl.create_default_context(cafile=str(certificate))


def _environment(folder: Path) -> dict[str, str]:
    """In which a node starts from bytecode, as one that is installed does, also where none is to be written."""
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return given | {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")} if given != os.environ else given


class Node:
    """One of the nodes: its files, and its process while it runs."""

    honest = True

    def __init__(self, k: int, programs: Programs, files: NodeFiles) -> None:
        self.k, self.programs, self.files = k, programs, files
        self.name, self.url, self.ledger, self.key = f"n{k}", files.url, files.ledger, files.key
        self.blocked = files.config.with_suffix(".blocked")
        self.seen = files.config.with_suffix(".seen")
        self.process: Process | None = None
        self.lives = 0
        self.frozen: tuple[float, bool] | None = None  # when its process was last stopped (True), or let go on
        self.ready = False  # it has said in this life that it is there
        self.began_s = 0.0
        self.most_mb = self.longest_s = 0.0

    @property
    def port(self) -> str:
        """Where it listens."""
        return self.url.rpartition(":")[2]

    @property
    def up(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def strategy(self) -> str:
        """What it plays when it is started next."""
        return HONEST

    def start(self, off_s: float = 0.0) -> None:
        """Run it, with a clock that is off by so much."""
        module = "wwwserve.eval.live.soak.node_process"
        given = [str(self.files.config), self.strategy, str(self.lives), str(off_s)]
        self.lives += 1
        self.began_s = time.monotonic()
        command = Command([sys.executable, "-m", module, *given], _environment(self.programs.folder))
        self.process = self.programs.start(self.name, command)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self._measure()
        self.ready = False
        self.process.kill()
        self.process.wait()

    async def stop(self) -> None:
        """As an operator stops it."""
        if self.process is not None and self.process.poll() is None:
            self._measure()
            self.ready = False
            self.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(self.process.wait)

    def freeze(self, frozen: bool) -> None:
        """Hold its process, or let it go on."""
        if self.process is not None and self.process.poll() is None:
            self.frozen = time.monotonic(), frozen
            self.process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def limit(self, size: int) -> None:
        """No file of it may grow beyond `size` bytes."""
        assert self.process is not None
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, LARGEST))

    def _measure(self) -> None:
        assert self.process is not None
        with suppress(OSError, IndexError, ValueError):
            self.most_mb = max(self.most_mb, rss_mb(self.process.pid))
        self.longest_s = max(self.longest_s, time.monotonic() - self.began_s)


class Malicious(Node):
    """The one that plays another strategy in each of its lives. The last, by which all know that it signed two of one
    thing, it plays once `ending`: from an old copy of its journal."""

    honest = False

    def __init__(self, k: int, programs: Programs, files: NodeFiles, seed: int) -> None:
        super().__init__(k, programs, files)
        self.played: list[str] = []
        self.ending = False
        self._draw = random.Random(f"malicious {seed}")

    @property
    def strategy(self) -> str:
        """See `Node`."""
        return self.played[-1]

    def start(self, off_s: float = 0.0) -> None:
        """See `Node`."""
        turns = (*STRATEGIES, EQUIVOCATOR) if self.ending else STRATEGIES
        fresh = [each for each in turns if each not in self.played[-len(turns) + 1 :]]
        self.played.append(self._draw.choice(fresh))
        old = self.ledger.with_suffix(".old")
        if self.strategy == EQUIVOCATOR and old.exists():
            for journal in self.ledger.parent.glob(self.ledger.name + "-*"):
                journal.unlink()
            shutil.copyfile(old, self.ledger)
        elif self.lives % KEPT_EACH == 0 and self.ledger.exists():
            with closing(sqlite3.connect(self.ledger)) as now, closing(sqlite3.connect(old)) as kept:
                now.backup(kept)
        super().start(off_s)


class Network:
    """All nodes, as whoever may look at them sees them."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self.honest = [node for node in nodes if node.honest]
        self.session: aiohttp.ClientSession
        self.problems: list[str] = []

    async def see(self, node: Node) -> dict[str, Any] | None:
        """What a node says of itself; None while it does not."""
        with suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError):
            async with self.session.get(node.url + "/network", timeout=aiohttp.ClientTimeout(total=SEEN_S)) as response:
                seen: dict[str, Any] = await response.json()
                return seen
        return None

    async def is_back(self, node: Node) -> bool:
        """Whether it is there, with its engine."""
        seen = await self.see(node)
        node.ready = node.ready or seen is not None
        return seen is not None and bool(seen["engine"]["up"])

    async def sees(self, nodes: Sequence[Node], others: Sequence[Node]) -> bool:
        """Whether the honest ones of `nodes` have their engine, and see of all honest nodes these others and none
        else, but for themselves."""
        honest = {node.key for node in self.honest}
        for node in (each for each in nodes if each.honest):
            seen = await self.see(node)
            if seen is None or not seen["engine"]["up"]:
                return False
            there = {each["key"] for each in seen["peers"] if each["there"]} & honest
            if there != {each.key for each in others if each.honest} - {node.key}:
                return False
        return True

    async def until(self, what: str, true: Any, for_s: float) -> bool:
        """Wait until `true` says so; a problem if it does not in time."""
        until_s = time.monotonic() + for_s
        while not await true():
            if time.monotonic() > until_s:
                self.problems.append(f"{what}: not within {for_s:g} s")
                return False
            await asyncio.sleep(0.2)
        return True
