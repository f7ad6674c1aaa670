"""Programs on this machine: engines, nodes before them, whole networks. Nothing else starts them.

`programs` starts any, each in a process group of its own with a log, and ends them with the context; a guard does so
where this process is killed. `served` waits for engines, `started` for nodes that see each other, `running` for a
network of nodes that are all alike. All of it is in one file, as all has to be ended by the same rules.
"""

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import yaml

from wwwserve.agents.hardware import BLOCK_TOKENS
from wwwserve.agents.kernel import compiled_before, say_compiling
from wwwserve.agents.lengths import Lognormal
from wwwserve.agents.policy.bundle import SHIPPED
from wwwserve.agents.rules import RULES
from wwwserve.serving import guard
from wwwserve.serving.config import MOST_ENGINES, parse
from wwwserve.serving.engine import calibrate, local_vllm
from wwwserve.serving.engine.probe import Settings
from wwwserve.serving.http.addresses import is_free
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.plain import in_words

NO_BROWSER = 10_080  # the port of this range that browsers open no page of: https://fetch.spec.whatwg.org/#bad-port
PORTS = [port for port in range(10_000, 20_000) if port != NO_BROWSER]
_ports = itertools.islice(itertools.cycle(PORTS), os.getpid() * 97 % 100 * 100, None)  # apart from other processes'
READY_S = {"emulated": 300.0, "vllm": 600.0}  # for a network to come up, by its engines, kernels still to be compiled
LOG_LINES = 10  # shown of a program that ends
MOST_SAID = 4096  # bytes of an error that are read
LOOK_S = 0.05  # between two looks at whether a program is ready

Process = subprocess.Popen[bytes]

# Nodes and engines are asked without a proxy, whatever the environment says: nodes speak to each other so as well.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NetworkError(RuntimeError):
    """A network that does not come up, or a node that does not answer; the message says which and why."""


# Programs.


class Command(NamedTuple):
    """A program to start."""

    argv: list[str]
    environment: Mapping[str, str] = os.environ
    core: int | None = None  # the only CPU core that it may use


class Programs:
    """Programs that run, by their names, with their files in `folder`."""

    def __init__(self, folder: Path, guarded: IO[bytes]) -> None:
        self.folder, self._guarded = folder, guarded
        self.running: dict[str, Process] = {}

    def log(self, name: str) -> Path:
        """What a program of this name prints."""
        return self.folder / f"{name}.log"

    def start(self, name: str, command: Command) -> Process:
        """Start a program, or one of a name whose program has ended again; what it prints is appended to its log."""
        pinned = [] if command.core is None else ["taskset", "-c", str(command.core)]
        with self.log(name).open("ab") as out:
            process = subprocess.Popen(
                [*pinned, *command.argv], stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
                env=command.environment,
            )  # fmt: skip
        self._guarded.write(b"%d\n" % process.pid)
        self.running[name] = process
        return process

    def wait(self, urls: Sequence[str], ready: Callable[[str], bool], ready_s: float) -> None:
        """Until every URL is ready. Raises NetworkError where a program ends meanwhile, or it takes longer."""
        until_s = time.monotonic() + ready_s
        waiting = list(urls)
        while waiting:
            for name, process in self.running.items():
                if process.poll() is not None:
                    said = self.log(name).read_text(errors="replace").strip().splitlines()
                    word = "\n".join(said[-LOG_LINES:]) or "no word"
                    raise NetworkError(f"{name} ended with {process.returncode}: {word}")
            if ready(waiting[0]):
                waiting.pop(0)
            elif time.monotonic() > until_s:
                raise NetworkError(f"{waiting[0]} was not ready within {ready_s:g} s")
            else:
                time.sleep(LOOK_S)

    def stop(self, *processes: Process) -> None:
        """End processes and all that they started, which is in the group of each."""
        for process in processes:
            _signal(process, signal.SIGTERM)
            _signal(process, signal.SIGCONT)  # one that was stopped could not end
        until_s = time.monotonic() + guard.STOP_S
        for process in processes:
            while _signal(process, 0):
                process.poll()
                if time.monotonic() > until_s:
                    _signal(process, signal.SIGKILL)
                time.sleep(0.02)
        self.running = {name: each for name, each in self.running.items() if each not in processes}


@contextmanager
def programs(folder: Path | None = None) -> Iterator[Programs]:
    """Programs that end with the context, the last first. Their files are left in `folder`; without one, removed."""
    with tempfile.TemporaryDirectory(prefix="wwwserve-") as made, _guarded() as guarded:
        running = Programs(folder or Path(made), guarded)
        try:
            yield running
        finally:
            running.stop(*reversed(running.running.values()))


@contextmanager
def _guarded() -> Iterator[IO[bytes]]:
    """Where the programs that are started are told, so that they end though we are killed."""
    command = [sys.executable, "-I", guard.__file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
    assert process.stdin is not None
    try:
        yield process.stdin
    finally:
        process.stdin.close()  # which also ends what a program of ours left behind
        process.wait()


def _signal(process: Process, number: int) -> bool:
    """Send a signal to the group of a process; returns whether there is any process in it."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports that are free now and that browsers open: below those that the system gives to whoever asks for any, and
    others at each call, so that hardly one is taken before it is used. Raises OSError if there are none."""
    found: list[int] = []
    if count == 0:
        return found
    for port in itertools.islice(_ports, len(PORTS)):
        with socket.socket() as asked, suppress(OSError):
            asked.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"{len(found)} ports of {PORTS[0]} to {PORTS[-1]} are free, expected {count}")


def local_urls(ports: Sequence[int]) -> list[str]:
    """URLs of this machine."""
    return [f"http://127.0.0.1:{port}" for port in ports]


def listens(url: str) -> bool:
    """Whether anything does at the port of a URL of this machine."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


def cpu_s(pid: int) -> float:
    """CPU time, s, that a process has used, with what it started, if it leads a group: of all that are in it.

    Raises FileNotFoundError for a process that is gone.
    """
    ticks = _ticks(Path(f"/proc/{pid}/stat"))[1]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if stat.parent.name != str(pid):
            try:
                group, used = _ticks(stat)
            except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                continue
            ticks += used if group == pid else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(stat: Path) -> tuple[int, int]:
    """Process group, and ticks of CPU time that were used, in user and kernel."""
    fields = stat.read_text().rpartition(")")[2].split()
    return int(fields[2]), int(fields[11]) + int(fields[12])


def rss_mb(pid: int) -> float:
    """Resident memory of a process, MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# Engines.


class Engines(NamedTuple):
    """Engines that run: their URLs and processes."""

    urls: list[str]
    processes: list[Process]


def emulator(
    port: int, *, gpu: str = "rtx-4090", model: str = "qwen3-8b", max_num_seqs: int = 64, speed: float = 1.0,
    seed: int = 0, serves: Sequence[str] = (), profile: Path | None = None, lengths: Lognormal | None = None,
    block_tokens: int | None = BLOCK_TOKENS,
) -> Command:  # fmt: skip
    """An emulated engine at `port`, of a GPU and model of the catalogue, or of the `profile` in a file; `lengths` are
    those of answers whose end is up to the model; prefixes are cached in blocks of `block_tokens`, if at all."""
    engine = ["--profile", str(profile)] if profile else ["--gpu", gpu, "--max-num-seqs", str(max_num_seqs)]
    named = ["--served-model-name", *serves] if serves else []
    drawn = []
    if lengths is not None:
        drawn = ["--output-median", str(lengths.median), "--output-sigma", str(lengths.sigma)]
        drawn += ["--output-max", str(lengths.max)]
    cache = ["--no-prefix-caching"] if block_tokens is None else ["--block-tokens", str(block_tokens)]
    return Command(
        [sys.executable, "-m", "wwwserve.envs.emulator", "--port", str(port), *engine, "--model", model, *named, *drawn,
         *cache,          "--speed", str(speed), "--seed", str(seed)]
    )  # fmt: skip


def vllm_servers(
    models: Sequence[str], ports: Sequence[int], name: str | None = None, kv_tokens: int | None = None
) -> list[Command]:
    """vLLM servers of small `models`, each on one core, in turn. Raises serving.engine.local_vllm.PrepareError."""
    made, cores = local_vllm.prepare(), local_vllm.cores()
    servers = []
    for i, (model, port) in enumerate(zip(models, ports, strict=True)):
        core = cores[i % len(cores)]
        servers.append(Command(*local_vllm.server(made, model, port, core, name, kv_tokens), core))
    return servers


@contextmanager
def served(
    commands: Sequence[Command], ports: Sequence[int], ready_s: float = READY_S["emulated"]
) -> Iterator[Engines]:
    """Engines alone, started by `commands`, all ready; they end with the context. Raises NetworkError."""
    with programs() as made:
        processes = [made.start(f"engine {k + 1}", command) for k, command in enumerate(commands)]
        made.wait(local_urls(ports), answers, ready_s)
        yield Engines(local_urls(ports), processes)


@contextmanager
def vllm(models: Sequence[str], name: str | None = None, kv_tokens: int | None = None) -> Iterator[Engines]:
    """Real vLLM engines of small `models`, all ready; they end with the context.

    `name` and `kv_tokens` are as in `serving.engine.local_vllm.server`. Raises NetworkError, PrepareError.
    """
    ports = free_ports(len(models))
    with served(vllm_servers(models, ports, name, kv_tokens), ports, READY_S["vllm"]) as engines:
        yield engines


def answers(url: str) -> bool:
    """Whether an engine answers."""
    try:
        with DIRECT.open(f"{url}/v1/models", timeout=2.0) as response:
            return bool(response.status == 200)
    except OSError:
        return False


# Nodes.


class Accounts(NamedTuple):
    """What every node of a network with ledgers begins with, credits."""

    credit: float
    stake: float
    exposure: float  # that it lends a peer at most


class NodeFiles(NamedTuple):
    """A node on disk: public key, URL, configuration, and its ledger, if it has one."""

    key: str
    url: str
    config: Path
    ledger: Path

    def command(self, core: int | None = None) -> Command:
        """Runs it."""
        return Command([sys.executable, "-m", "wwwserve.serving.cli", "node", str(self.config)], core=core)


def write_nodes(
    folder: Path, configured: Sequence[dict[str, Any]], accounts: Accounts | None = None
) -> list[NodeFiles]:
    """Give every node a key, with static membership all others as peers, and with `accounts` a ledger and the genesis
    that all share; write all that to `folder`."""
    identities = [Identity.generate() for _ in configured]
    urls = local_urls([node["port"] for node in configured])
    urls = [f"https{url[4:]}" if "tls" in node else url for url, node in zip(urls, configured, strict=True)]
    genesis, nodes = folder / "genesis.yaml", []
    if accounts:
        each = {"credit": accounts.credit, "stake": accounts.stake}
        genesis.write_text(yaml.safe_dump({"accounts": {identity.name: each for identity in identities}}))
    for k, (node, identity) in enumerate(zip(configured, identities, strict=True)):
        key, ledger = folder / f"node{k + 1}.pem", folder / f"node{k + 1}.db"
        identity.save(key)
        limits = {"drain_s": 0.0} | node.get("limits", {})  # a network for trials ends at once
        settings = node | {"key": str(key), "limits": limits}
        policy = node.get("policy")
        if policy is not None and policy not in (*SHIPPED, *RULES):
            settings["policy"] = str(Path(policy).resolve())  # paths in a file count from its folder
        if "membership" not in node and "peers" not in node:
            settings["peers"] = [{"key": identities[i].name, "url": url} for i, url in enumerate(urls) if i != k]
        if accounts:
            settings["ledger"] = {"file": str(ledger), "genesis": str(genesis), "exposure": accounts.exposure}
        config = folder / f"node{k + 1}.yaml"
        config.write_text(yaml.safe_dump(settings))
        nodes.append(NodeFiles(identity.name, urls[k], config, ledger))
    return nodes


class Network(NamedTuple):
    """A network that runs: URLs and keys of its nodes, URLs of their engines, its processes, the nodes' files, and the
    URLs where they show themselves."""

    urls: list[str]
    keys: list[str]
    engine_urls: list[str]
    engines: list[Process]
    nodes: list[Process]
    files: list[NodeFiles]
    pages: list[str]


@contextmanager
def started(
    configured: Sequence[dict[str, Any]], commands: Sequence[Command], ready_s: float = READY_S["emulated"],
    measure: bool = False, accounts: Accounts | None = None, cores: Sequence[int] | None = None,
) -> Iterator[Network]:  # fmt: skip
    """A network of the nodes `configured`, all ready; it ends with the context, and so do its engines, started by
    `commands`. Without any, engines run already. Nodes are made as by `write_nodes`; `cores` has one for each.

    With `measure`, the engines' profiles are measured first. Raises NetworkError for what is not ready in `ready_s`,
    serving.engine.fit.CalibrationError for an engine that cannot be measured.
    """
    engine_urls = [url for node in configured for url in _engine_urls(node)]
    with programs() as made:
        engines = [made.start(f"engine {k + 1}", command) for k, command in enumerate(commands)]
        if measure:
            made.wait(engine_urls, answers, ready_s)
            _measure(configured)
        files = write_nodes(made.folder, configured, accounts)
        urls = [each.url for each in files]
        nodes = [made.start(f"node {k + 1}", each.command(cores[k] if cores else None)) for k, each in enumerate(files)]
        try:
            pages = [_pages(node, url) for node, url in zip(configured, urls, strict=True)]
            keys = {url: each.key for url, each in zip(pages, files, strict=True)}
            made.wait(pages, lambda url: sees(url, len(urls) - 1, keys[url]), ready_s)
            yield Network(urls, [each.key for each in files], engine_urls, engines, nodes, files, pages)
        finally:
            made.stop(*nodes)  # before their engines


def _engine_urls(node: Mapping[str, Any]) -> list[str]:
    url = node["engine"]["url"]
    return [url] if isinstance(url, str) else list(url)


def _pages(node: Mapping[str, Any], url: str) -> str:
    """Where a node shows itself: at its URL, or, as with TLS nobody else knows its certificate, at a listener apart."""
    return local_urls([node["admin"]["port"]])[0] if "admin" in node else url


def _measure(configured: Sequence[dict[str, Any]]) -> None:
    """Measure the first engine of each node, one after the other, while the others are idle."""
    for node in configured:
        local_vllm.on_stderr(f"measuring the engine of {node['name']}, which takes minutes")
        found = asyncio.run(calibrate.calibrate(_engine_urls(node)[0], Settings()))
        node["engine"]["profile"] = {"kind": "measured", **calibrate.measured(found.profile)}


def sees(url: str, peers: int, key: str) -> bool:
    """Whether the node of that public key is there, has its engine and sees so many peers."""
    try:
        seen = look(url)
    except NetworkError:
        return False
    there = sum(peer["there"] for peer in seen["peers"])
    return bool(seen["engine"]["up"]) and there == peers and seen["key"] == key


def look(url: str, key: str | None = None) -> dict[str, Any]:
    """What a node says of itself and its peers, to who has the key of its operator. Raises NetworkError."""
    if not url.startswith(("http://", "https://")):
        raise NetworkError(f"{url} is no URL of a node, expected http://HOST:PORT")
    try:
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        asked = urllib.request.Request(url.rstrip("/") + "/network", headers=headers)
        with DIRECT.open(asked, timeout=2.0) as response:
            seen: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        hint = _HINTS.get(error.code, "")
        raise NetworkError(f"{url} answers with {error.code}: {_said(error.read(MOST_SAID))}{hint}") from None
    except (OSError, ValueError) as error:
        raise NetworkError(f"{url} does not answer as a node: {in_words(error)}") from None
    return seen


_HINTS = {
    401: "; give `admin.key` of the node by --key, or its node.yaml by --config",
    404: "; a node with `admin` shows itself there alone: give the URL of that, or its node.yaml by --config",
}


def _said(body: bytes) -> str:
    """What an error of a node says, or another server's, as a terminal may show it."""
    try:
        said = str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, LookupError):
        said = body.decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in said[:200])


# Networks of nodes that are all alike.


class Plan(NamedTuple):
    """A network to run: as many nodes, all alike."""

    nodes: int
    base_port: int
    policy: str | None
    gpu: str  # this and the next three: of emulated engines
    model: str
    max_num_seqs: int
    speed: float
    engine: Literal["emulated", "vllm"] = "emulated"
    calibrate: bool = False  # measure each engine, instead of taking the profile as it is known
    membership: Literal["static", "zenoh"] = "static"
    engines: int = 1  # of each node


MOST_PORT = 65535


def configurations(plan: Plan) -> tuple[list[dict[str, Any]], list[Command]]:
    """The nodes' configurations, and the commands of their engines.

    Raises serving.config.ConfigError for what cannot be, NetworkError for a number of nodes or a model that cannot be,
    serving.engine.local_vllm.PrepareError where vLLM cannot be prepared.
    """
    if not 1 <= plan.nodes <= 256:
        raise NetworkError(f"--nodes is {plan.nodes}, expected 1 to 256")
    if not 1 <= plan.engines <= MOST_ENGINES:
        raise NetworkError(f"--engines is {plan.engines}, expected 1 to {MOST_ENGINES}")
    highest = MOST_PORT + 1 - plan.nodes
    if not 0 <= plan.base_port <= highest:
        expected = f"1 to {highest}, or 0 for any ports that are free"
        raise NetworkError(f"--base-port is {plan.base_port}, expected {expected}")
    for_nodes = range(plan.base_port, plan.base_port + plan.nodes)
    try:
        free = [port for port in free_ports((3 + plan.engines) * plan.nodes) if port not in for_nodes]
    except OSError as error:
        raise NetworkError(f"--nodes is {plan.nodes}, --engines {plan.engines}: {error}") from None
    ports, engine_ports = free[: plan.nodes], free[2 * plan.nodes : (2 + plan.engines) * plan.nodes]
    endpoints = [f"tcp/127.0.0.1:{port}" for port in free[plan.nodes : 2 * plan.nodes]]
    if plan.base_port:
        ports = [*for_nodes]
        taken = [port for port in ports if not is_free("127.0.0.1", port)]
        if taken:
            raise NetworkError(
                f"--base-port is {plan.base_port}, and {', '.join(map(str, taken))} "
                f"{'is' if len(taken) == 1 else 'are'} in use, perhaps by another `wwwserve up`: end that, choose "
                "another --base-port, or 0 for any ports that are free"
            )
    names = [f"n{i + 1}" for i in range(plan.nodes)]
    profile, engines = (_vllm if plan.engine == "vllm" else _emulated)(plan, engine_ports)
    nodes = []
    for i, name in enumerate(names):
        others = [k for k in range(plan.nodes) if k != i]
        urls = local_urls(engine_ports[plan.engines * i : plan.engines * (i + 1)])
        membership: dict[str, Any]
        if plan.membership == "zenoh":
            # Two to begin with, so that it can come back though one of them is gone; gossip tells of the others.
            first = [endpoints[k] for k in others[:2]]
            membership = {"membership": {"kind": "zenoh", "network": "up", "listen": [endpoints[i]], "connect": first}}
        else:
            membership = {}
        node = {
            "name": name, "port": ports[i], "seed": i, "policy": plan.policy, "serves": [plan.model],
            "engine": {"url": urls[0] if plan.engines == 1 else urls, "profile": profile},
            "market": {"speed": plan.speed if plan.engine == "emulated" else 1.0}, **membership,
        }  # fmt: skip
        parse(node | {"key": "made when it starts"}, f"node {name}")
        nodes.append(node)
    return nodes, engines


def _emulated(plan: Plan, ports: Sequence[int]) -> tuple[dict[str, Any], list[Command]]:
    """Profile and commands of emulated engines."""
    return (
        {"kind": "catalogue", "gpu": plan.gpu, "model": plan.model, "max_num_seqs": plan.max_num_seqs},
        [
            emulator(
                port, gpu=plan.gpu, model=plan.model, max_num_seqs=plan.max_num_seqs, speed=plan.speed, seed=i
            ) for i, port in enumerate(ports)
        ],
    )  # fmt: skip


def _vllm(plan: Plan, ports: Sequence[int]) -> tuple[dict[str, Any], list[Command]]:
    """Profile and commands of vLLM servers, each on one core, in turn."""
    if plan.model not in local_vllm.PROFILES:
        known = ", ".join(local_vllm.PROFILES)
        raise NetworkError(f"--model is {plan.model!r}, expected one of {known} with --engine vllm")
    return {"kind": "measured", **local_vllm.PROFILES[plan.model]}, vllm_servers([plan.model] * len(ports), ports)


@contextmanager
def running(plan: Plan) -> Iterator[Network]:
    """A network whose nodes are all ready; it ends with the context. Raises as `configurations`, and NetworkError for
    what does not come up."""
    nodes, engines = configurations(plan)
    if not compiled_before("node", *(["emulator"] if plan.engine == "emulated" else [])):
        say_compiling()  # nodes and engines do, in logs of their own
    with started(nodes, engines, READY_S[plan.engine], plan.calibrate) as network:
        yield network
