"""A whole network on this machine: engines, nodes before them, and a table of what they do."""

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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from serving.config import parse

READY_S = 300.0  # for a network to come up, on a machine where kernels are still to be compiled
STOP_S = 8.0  # for a process to end by itself
REFRESH_S = 1.0


class NetworkError(RuntimeError):
    """A network that does not come up, or a node that does not answer; the message says which and why."""


class Network(NamedTuple):
    """A network that runs: the nodes' URLs, and its processes."""

    urls: list[str]
    engines: list["subprocess.Popen[bytes]"]
    nodes: list["subprocess.Popen[bytes]"]


class Plan(NamedTuple):
    """A network to run: as many nodes, all alike."""

    nodes: int
    base_port: int
    policy: str | None
    gpu: str
    model: str
    max_num_seqs: int
    speed: float
    membership: Literal["static", "zenoh"] = "static"


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def configurations(plan: Plan) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The nodes' configurations, and the commands of their engines.

    Raises serving.config.ConfigError for what cannot be, NetworkError for too few nodes.
    """
    if not 1 <= plan.nodes <= 256:
        raise NetworkError(f"--nodes is {plan.nodes}, expected 1 to 256")
    free = free_ports(3 * plan.nodes)
    engine_ports, ports, endpoints = free[::3], free[1::3], [f"tcp/127.0.0.1:{port}" for port in free[2::3]]
    if plan.base_port:
        ports = [plan.base_port + i for i in range(plan.nodes)]
    names = [f"n{i + 1}" for i in range(plan.nodes)]
    nodes, engines = [], []
    for i, name in enumerate(names):
        others = [k for k in range(plan.nodes) if k != i]
        membership: dict[str, Any]
        if plan.membership == "zenoh":
            # Two to begin with, so that it can come back though one of them is gone; gossip tells of the others.
            first = [endpoints[k] for k in others[:2]]
            membership = {"membership": {"kind": "zenoh", "network": "up", "listen": [endpoints[i]], "connect": first}}
        else:
            membership = {"peers": [{"name": names[k], "url": f"http://127.0.0.1:{ports[k]}"} for k in others]}
        profile = {"kind": "catalogue", "gpu": plan.gpu, "model": plan.model, "max_num_seqs": plan.max_num_seqs}
        node = {
            "name": name, "port": ports[i], "seed": i, "policy": plan.policy, "serves": [plan.model],
            "engine": {"url": f"http://127.0.0.1:{engine_ports[i]}", "profile": profile},
            "market": {"speed": plan.speed}, **membership,
        }  # fmt: skip
        parse(node, f"node {name}")
        nodes.append(node)
        engines.append(
            [sys.executable, "-m", "envs.emulator", "--port", str(engine_ports[i]), "--gpu", plan.gpu, "--model",
             plan.model, "--max-num-seqs", str(plan.max_num_seqs), "--speed", str(plan.speed), "--seed", str(i)]
        )  # fmt: skip
    return nodes, engines


@contextmanager
def running(plan: Plan) -> Iterator[Network]:
    """A network whose nodes are all ready; it ends with the context. Raises as `configurations`, and NetworkError for
    what does not come up."""
    with started(*configurations(plan)) as network:
        yield network


@contextmanager
def started(configured: Sequence[dict[str, Any]], engine_commands: Sequence[list[str]]) -> Iterator[Network]:
    """A network of the nodes `configured`, each before the engine of the same place, all ready; it ends with the
    context. Raises NetworkError for what does not come up."""
    engines: list[subprocess.Popen[bytes]] = []
    nodes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="wwwserve-") as folder:
        try:
            for k, command in enumerate(engine_commands):
                engines.append(_start(command, Path(folder, f"engine{k + 1}.log")))
            for k, node in enumerate(configured):
                file = Path(folder, f"{node['name']}.yaml")
                file.write_text(yaml.safe_dump(node))
                command = [sys.executable, "-m", "serving.cli", "node", str(file)]
                nodes.append(_start(command, Path(folder, f"node{k + 1}.log")))
            urls = [f"http://127.0.0.1:{node['port']}" for node in configured]
            _wait(urls, {"engine": engines, "node": nodes}, Path(folder))
            yield Network(urls, engines, nodes)
        finally:
            _stop(nodes)
            _stop(engines)


def _start(command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True, env=os.environ
        )


def _wait(urls: list[str], started: "dict[str, list[subprocess.Popen[bytes]]]", folder: Path) -> None:
    """Until every node has an engine and sees all others."""
    until_s = time.monotonic() + READY_S
    waiting = list(urls)
    while waiting:
        for what, processes in started.items():
            for k, process in enumerate(processes):
                if process.poll() is not None:
                    said = (folder / f"{what}{k + 1}.log").read_text(errors="replace").strip().splitlines()
                    word = said[-1] if said else "no word"
                    raise NetworkError(f"{what} {k + 1} ended with {process.returncode}: {word}")
        try:
            seen = look(waiting[0])
            if seen["engine"]["up"] and sum(peer["there"] for peer in seen["peers"]) == len(urls) - 1:
                waiting.pop(0)
                continue
        except NetworkError:
            pass
        if time.monotonic() > until_s:
            raise NetworkError(f"{waiting[0]} was not ready within {READY_S:g} s")
        time.sleep(0.05)


def _stop(processes: "list[subprocess.Popen[bytes]]") -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.send_signal(signal.SIGCONT)  # one that was stopped could not end
    until_s = time.monotonic() + STOP_S
    for process in processes:
        try:
            process.wait(max(0.1, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def look(url: str) -> dict[str, Any]:
    """What a node says of itself and its peers. Raises NetworkError."""
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
        view.add_row(
            each["name"], each["url"], "up" if engine["up"] else "down", f"{engine['running']:.0f}",
            f"{engine['waiting']:.0f}", f"{engine['kv_use']:.0%}", str(each["held"]), str(each["guests"]),
            f"{each['price']:g}", str(requests["accepted"]), str(answered), str(requests["handed_over"]),
            f"{requests['on_time'] / answered:.0%}" if answered else "-", f"{requests['mean_latency_s']:.2f}",
            " ".join(decision["to"] for decision in each["decisions"][-6:]),
        )  # fmt: skip
    return view


def show(seen: dict[str, Any]) -> None:
    """Print a node and what it sees of its peers."""
    console = Console()
    console.print(table([seen]))
    peers = Table(title=f"peers as {seen['name']} sees them")
    for name in ("peer", "API", "there", "age s", "running", "waiting", "KV", "price", "stake", "ours there"):
        peers.add_column(name)
    for each in seen["peers"]:
        peers.add_row(
            each["name"], str(each["url"]), "yes" if each["there"] else "no", str(each["age_s"]),
            f"{each['running']:.0f}", f"{each['waiting']:.0f}",
            "-" if each["kv_use"] is None else f"{each['kv_use']:.0%}", f"{each['price']:g}", f"{each['stake']:g}",
            str(each["out"]),
        )  # fmt: skip
    console.print(peers)


def up(plan: Plan) -> None:
    """Run a network until SIGINT or SIGTERM, with a live table on a terminal; else a line of JSON says when it is
    ready. Raises as `running`."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
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
