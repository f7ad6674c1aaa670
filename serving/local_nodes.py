"""A whole network on this machine: engines, nodes before them, and a table of what they do."""

import asyncio
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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from wwwserve.serving import guard
from wwwserve.serving.config import parse
from wwwserve.serving.engine import calibrate, local_vllm
from wwwserve.serving.engine.probe import Settings
from wwwserve.serving.http.keys import Identity

READY_S = {"emulated": 300.0, "vllm": 600.0}  # for a network to come up, by its engines, kernels still to be compiled
LOG_LINES = 10  # shown of an engine that ends
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REFRESH_S = 1.0


class NetworkError(RuntimeError):
    """A network that does not come up, or a node that does not answer; the message says which and why."""


class Network(NamedTuple):
    """A network that runs: URLs and public keys of its nodes, URLs of their engines, and its processes."""

    urls: list[str]
    keys: list[str]
    engine_urls: list[str]
    engines: list["subprocess.Popen[bytes]"]
    nodes: list["subprocess.Popen[bytes]"]


class Engines(NamedTuple):
    """Engines that run: their URLs and processes."""

    urls: list[str]
    processes: list["subprocess.Popen[bytes]"]


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


class Command(NamedTuple):
    """A program to start, with its environment."""

    argv: list[str]
    environment: Mapping[str, str] = os.environ


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def configurations(plan: Plan) -> tuple[list[dict[str, Any]], list[Command]]:
    """The nodes' configurations, and the commands of their engines.

    Raises serving.config.ConfigError for what cannot be, NetworkError for a number of nodes or a model that cannot be,
    serving.engine.local_vllm.PrepareError where vLLM cannot be prepared.
    """
    if not 1 <= plan.nodes <= 256:
        raise NetworkError(f"--nodes is {plan.nodes}, expected 1 to 256")
    free = free_ports(3 * plan.nodes)
    engine_ports, ports, endpoints = free[::3], free[1::3], [f"tcp/127.0.0.1:{port}" for port in free[2::3]]
    if plan.base_port:
        ports = [plan.base_port + i for i in range(plan.nodes)]
    names = [f"n{i + 1}" for i in range(plan.nodes)]
    profile, engines = (_vllm if plan.engine == "vllm" else _emulated)(plan, engine_ports)
    nodes = []
    for i, name in enumerate(names):
        others = [k for k in range(plan.nodes) if k != i]
        membership: dict[str, Any]
        if plan.membership == "zenoh":
            # Two to begin with, so that it can come back though one of them is gone; gossip tells of the others.
            first = [endpoints[k] for k in others[:2]]
            membership = {"membership": {"kind": "zenoh", "network": "up", "listen": [endpoints[i]], "connect": first}}
        else:
            membership = {}
        node = {
            "name": name, "port": ports[i], "seed": i, "policy": plan.policy, "serves": [plan.model],
            "engine": {"url": f"http://127.0.0.1:{engine_ports[i]}", "profile": profile},
            "market": {"speed": plan.speed if plan.engine == "emulated" else 1.0}, **membership,
        }  # fmt: skip
        parse(node | {"key": "made when it starts"}, f"node {name}")
        nodes.append(node)
    return nodes, engines


def _emulated(plan: Plan, ports: Sequence[int]) -> tuple[dict[str, Any], list[Command]]:
    """Profile and commands of emulated engines."""
    shared = ["--gpu", plan.gpu, "--model", plan.model, "--max-num-seqs", str(plan.max_num_seqs), "--speed",
              str(plan.speed)]  # fmt: skip
    return (
        {"kind": "catalogue", "gpu": plan.gpu, "model": plan.model, "max_num_seqs": plan.max_num_seqs},
        [Command([sys.executable, "-m", "wwwserve.envs.emulator", "--port", str(port), "--seed", str(i), *shared])
         for i, port in enumerate(ports)],
    )  # fmt: skip


def _vllm(plan: Plan, ports: Sequence[int]) -> tuple[dict[str, Any], list[Command]]:
    """Profile and commands of vLLM servers, each on one core, in turn."""
    if plan.model not in local_vllm.PROFILES:
        known = ", ".join(local_vllm.PROFILES)
        raise NetworkError(f"--model is {plan.model!r}, expected one of {known} with --engine vllm")
    return {"kind": "measured", **local_vllm.PROFILES[plan.model]}, _vllm_servers([plan.model] * len(ports), ports)


def _vllm_servers(
    models: Sequence[str], ports: Sequence[int], name: str | None = None, kv_tokens: int | None = None
) -> list[Command]:
    made, cores = local_vllm.prepare(), local_vllm.cores()
    return [
        Command(*local_vllm.server(made, model, port, cores[i % len(cores)], name, kv_tokens))
        for i, (model, port) in enumerate(zip(models, ports, strict=True))
    ]


@contextmanager
def running(plan: Plan) -> Iterator[Network]:
    """A network whose nodes are all ready; it ends with the context. Raises as `configurations`, and NetworkError for
    what does not come up."""
    nodes, engines = configurations(plan)
    with started(nodes, engines, READY_S[plan.engine], plan.calibrate) as network:
        yield network


@contextmanager
def served(
    commands: Sequence[Command], urls: Sequence[str], ready_s: float
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Engines alone, started by `commands`, which answer at `urls`; they end with the context. Raises NetworkError."""
    engines: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="wwwserve-") as folder, _guarded() as told:
        try:
            for k, command in enumerate(commands):
                engines.append(_start(command, Path(folder, f"engine{k + 1}.log"), told))
            _wait(urls, _serves, {"engine": engines}, Path(folder), ready_s)
            yield engines
        finally:
            _stop(engines)


@contextmanager
def vllm(models: Sequence[str], name: str | None = None, kv_tokens: int | None = None) -> Iterator[Engines]:
    """Real vLLM engines of small `models`, each on one core, in turn; they end with the context.

    `name` and `kv_tokens` are as in `serving.engine.local_vllm.server`. Raises NetworkError, PrepareError.
    """
    ports = free_ports(len(models))
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with served(_vllm_servers(models, ports, name, kv_tokens), urls, READY_S["vllm"]) as processes:
        yield Engines(urls, processes)


@contextmanager
def started(
    configured: Sequence[dict[str, Any]], commands: Sequence[Command], ready_s: float = 300.0, measure: bool = False
) -> Iterator[Network]:
    """A network of the nodes `configured`, all ready; it ends with the context, and so do its engines, started by
    `commands`. Without any, engines run already. Every node gets a key, and with static membership all others as peers.

    With `measure`, the engines' profiles are measured first. Raises NetworkError for what is not ready in `ready_s`,
    serving.engine.calibrate.CalibrationError for an engine that cannot be measured.
    """
    engines: list[subprocess.Popen[bytes]] = []
    nodes: list[subprocess.Popen[bytes]] = []
    processes = {"engine": engines, "node": nodes}
    urls = [f"http://127.0.0.1:{node['port']}" for node in configured]
    engine_urls = [node["engine"]["url"] for node in configured]
    with tempfile.TemporaryDirectory(prefix="wwwserve-") as folder, _guarded() as guarded:
        try:
            for k, command in enumerate(commands):
                engines.append(_start(command, Path(folder, f"engine{k + 1}.log"), guarded))
            if measure:
                _wait(engine_urls, _serves, processes, Path(folder), ready_s)
                _measure(configured)
            keys = [_new_key(Path(folder, f"node{k + 1}.pem")) for k in range(len(configured))]
            for k, node in enumerate(configured):
                told = node | {"key": str(Path(folder, f"node{k + 1}.pem"))}
                if "membership" not in node:
                    others = [i for i in range(len(keys)) if i != k]
                    told["peers"] = [{"key": keys[i], "url": urls[i]} for i in others]
                file = Path(folder, f"node{k + 1}.yaml")
                file.write_text(yaml.safe_dump(told))
                command = Command([sys.executable, "-m", "wwwserve.serving.cli", "node", str(file)])
                nodes.append(_start(command, Path(folder, f"node{k + 1}.log"), guarded))
            _wait(urls, lambda url: _sees_all(url, len(urls) - 1), processes, Path(folder), ready_s)
            yield Network(urls, keys, engine_urls, engines, nodes)
        finally:
            _stop(nodes)
            _stop(engines)


def _new_key(file: Path) -> str:
    """The public key of a new one, which is kept in the file."""
    identity = Identity.generate()
    identity.save(file)
    return identity.name


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


def _start(command: Command, log: Path, told: IO[bytes]) -> "subprocess.Popen[bytes]":
    with log.open("wb") as out:
        process = subprocess.Popen(
            command.argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
            env=command.environment,
        )  # fmt: skip
    told.write(b"%d\n" % process.pid)
    return process


def _measure(configured: Sequence[dict[str, Any]]) -> None:
    """Measure the engines, one after the other, while the others are idle."""
    for node in configured:
        local_vllm.on_stderr(f"measuring the engine of {node['name']}, which takes minutes")
        found = asyncio.run(calibrate.calibrate(node["engine"]["url"], Settings()))
        node["engine"]["profile"] = {"kind": "measured", **calibrate.measured(found.profile)}


def _wait(
    urls: Sequence[str], ready: Callable[[str], bool], started: "dict[str, list[subprocess.Popen[bytes]]]",
    folder: Path, ready_s: float,
) -> None:  # fmt: skip
    """Until every URL is ready."""
    until_s = time.monotonic() + ready_s
    waiting = list(urls)
    while waiting:
        for what, processes in started.items():
            for k, process in enumerate(processes):
                if process.poll() is not None:
                    said = (folder / f"{what}{k + 1}.log").read_text(errors="replace").strip().splitlines()
                    word = "\n".join(said[-LOG_LINES:] if what == "engine" else said[-1:]) or "no word"
                    raise NetworkError(f"{what} {k + 1} ended with {process.returncode}: {word}")
        if ready(waiting[0]):
            waiting.pop(0)
        elif time.monotonic() > until_s:
            raise NetworkError(f"{waiting[0]} was not ready within {ready_s:g} s")
        else:
            time.sleep(0.05)


def _serves(url: str) -> bool:
    """Whether an engine answers."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=2.0) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _sees_all(url: str, peers: int) -> bool:
    """Whether a node has its engine and sees so many peers."""
    try:
        seen = look(url)
    except NetworkError:
        return False
    return bool(seen["engine"]["up"]) and sum(peer["there"] for peer in seen["peers"]) == peers


def _stop(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
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


def _signal(process: "subprocess.Popen[bytes]", number: int) -> bool:
    """Send a signal to the group of a process; returns whether there is any process in it."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def look(url: str) -> dict[str, Any]:
    """What a node says of itself and its peers. Raises NetworkError."""
    if not url.startswith(("http://", "https://")):
        raise NetworkError(f"{url} is no URL of a node, expected http://HOST:PORT")
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/network", timeout=2.0) as response:
            seen: dict[str, Any] = json.load(response)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise NetworkError(f"{url} does not answer as a node: {error}") from None
    return seen


def table(seen: list[dict[str, Any]]) -> Table:
    """Nodes as rows: load, price, decisions, SLO."""
    view = Table(title="wwwserve", expand=False)
    for name in ("node", "API", "engine", "running", "waiting", "KV", "held", "guests", "price", "asked", "answered",
                 "handed over", "in time", "mean s", "last decisions"):  # fmt: skip
        view.add_column(name, justify="left" if name in ("node", "API", "engine", "last decisions") else "right")
    for each in seen:
        engine, requests = each["engine"], each["requests"]
        answered = requests["answered"]
        labels = {peer["key"]: _who(peer) for peer in each["peers"]}
        view.add_row(
            each["name"], each["url"], "up" if engine["up"] else "down", f"{engine['running']:.0f}",
            f"{engine['waiting']:.0f}", f"{engine['kv_use']:.0%}", str(each["held"]), str(each["guests"]),
            f"{each['price']:g}", str(requests["accepted"]), str(answered), str(requests["handed_over"]),
            f"{requests['on_time'] / answered:.0%}" if answered else "-", f"{requests['mean_latency_s']:.2f}",
            " ".join(labels.get(decision["to"], decision["to"][:8]) for decision in each["decisions"][-6:]),
        )  # fmt: skip
    return view


def _who(peer: Mapping[str, Any]) -> str:
    """What a peer calls itself; of one that is gone the beginning of its key."""
    return str(peer["label"] or peer["key"][:8])


def show(seen: dict[str, Any]) -> None:
    """Print a node and what it sees of its peers, in lines that fit a narrow terminal."""
    console = Console()
    own = Table(title="wwwserve", show_header=False)
    for column in table([seen]).columns:  # one node, so names stand before their values
        own.add_row(column.header, *column.cells)
    console.print(own)
    peers = Table(title=f"peers as {seen['name']} sees them")
    peers.add_column("peer", overflow="fold")
    for name in ("there", "age s", "run", "wait", "KV", "price", "stake", "ours"):
        peers.add_column(name, no_wrap=True)
    peers.add_column("API", overflow="fold")
    for each in seen["peers"]:
        age_s, kv_use = each["age_s"], each["kv_use"]
        peers.add_row(
            _who(each), "yes" if each["there"] else "no", "-" if age_s is None else f"{age_s:.1f}",
            f"{each['running']:.0f}", f"{each['waiting']:.0f}", "-" if kv_use is None else f"{kv_use:.0%}",
            f"{each['price']:g}", f"{each['stake']:.3g}", str(each["out"]), each["url"] or "-",
        )  # fmt: skip
    console.print(peers)


def up(plan: Plan) -> None:
    """Run a network until SIGINT or SIGTERM, with a live table on a terminal; else a line of JSON says when it is
    ready. Raises as `running`."""

    def stop(number: int, frame: object) -> None:
        for each in STOPPING:  # a second one would leave processes behind
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in STOPPING:
        signal.signal(each, stop)
    console = Console()
    try:
        with running(plan) as network:
            if not console.is_terminal:
                print(json.dumps({"nodes": network.urls, "model": plan.model}), flush=True)
                while True:
                    signal.pause()
            with Live(console=console, auto_refresh=False) as live:
                while True:
                    seen = []
                    for url in network.urls:
                        try:
                            seen.append(look(url))
                        except NetworkError:
                            continue
                    live.update(table(seen), refresh=True)
                    time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        pass
