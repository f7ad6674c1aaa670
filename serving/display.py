"""Watch nodes: one in detail, or a whole network on this machine as a live table."""

import json
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from wwwserve.serving.console.network import PORT, network_console
from wwwserve.serving.local_nodes import NetworkError, Plan, look, running

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REFRESH_S = 1.0


LEFT = ("node", "API", "engine", "last decisions")  # as text is; numbers are at the right
# Columns that a network's table does without where the terminal is too narrow, the first one first.
SPARED = ("last decisions", "API", "margin", "markup", "remote", "held", "tariff", "engine", "answered", "waiting")
WIDE = 1000  # characters, more than a table has


def frame(urls: Sequence[str], page: str, width: int) -> Group:
    """What `wwwserve up` shows: the nodes at `urls` that answer, and where the page of the network is."""
    seen = []
    for url in urls:
        try:
            seen.append(look(url))
        except NetworkError:
            continue
    return Group(table(seen, width), f"console: {page}")


def table(seen: list[dict[str, Any]], width: int | None = None) -> Table:
    """Nodes as rows: load, tariff, decisions, SLO; as many columns as `width` characters have place for."""
    rows = [_row(each) for each in seen]
    console = Console(width=WIDE)
    for spared in range(len(SPARED) + 1):
        names = [name for name in (rows[0] if rows else ()) if name not in SPARED[:spared]]
        view = Table(title="wwwserve", caption="a wider terminal shows more" if spared else None, expand=False)
        for name in names:
            view.add_column(name, justify="left" if name in LEFT else "right")
        for row in rows:
            view.add_row(*(row[name] for name in names))
        if width is None or console.measure(view).maximum <= width:
            break
    return view


def _row(each: dict[str, Any]) -> dict[str, str]:
    """What a node's table shows, by the names of the columns."""
    engine, requests = each["engine"], each["requests"]
    answered = requests["answered"]
    labels = {peer["key"]: _who(peer) for peer in each["peers"]}
    decisions = [labels.get(decision["to"], decision["to"][:8]) for decision in each["decisions"][-6:]]
    up = engine["up"]  # else its load is what it counts as
    return {
        "node": each["name"], "API": each["url"], "engine": _state(engine),
        "running": f"{engine['running']:.0f}" if up else "-", "waiting": f"{engine['waiting']:.0f}" if up else "-",
        "KV": f"{engine['kv_use']:.0%}" if up else "-",
        "held": str(each["held"]), "remote": str(each["remote"]), "tariff": _tariff(each["tariff"]),
        "markup": f"{each['markup']:g}", "margin": "-" if each["margin"] is None else f"{each['margin']:+.0%}",
        "asked": str(requests["accepted"]), "answered": str(answered), "handed over": str(requests["handed_over"]),
        "in time": f"{requests['on_time'] / answered:.0%}" if answered else "-",
        "mean s": f"{requests['mean_latency_s']:.2f}" if answered else "-", "last decisions": " ".join(decisions),
    }  # fmt: skip


def _state(engine: Mapping[str, Any]) -> str:
    each = engine.get("each", ())
    if len(each) < 2 or not engine["up"]:
        return "up" if engine["up"] else "down"
    return f"{sum(one['takes'] for one in each)} of {len(each)} up"


def _tariff(tariff: Mapping[str, float]) -> str:
    """Credits per 1000 tokens of input and of output."""
    return f"{tariff['input']:.2g}/{tariff['output']:.2g}"


def _who(peer: Mapping[str, Any]) -> str:
    """What a peer calls itself; of one that is gone the beginning of its key."""
    return str(peer["label"] or peer["key"][:8])


def show(seen: dict[str, Any]) -> None:
    """Print a node and what it sees of its peers, in lines that fit a narrow terminal."""
    console = Console()
    own = Table(title="wwwserve", show_header=False)
    for name, shown in _row(seen).items():
        own.add_row(name, shown)
        if name == "API":
            own.add_row("policy", seen["policy"])
        if name == "engine" and seen["engine"].get("reason"):
            own.add_row("reason", seen["engine"]["reason"])
    console.print(own)
    if len(seen["engine"].get("each", ())) > 1:
        console.print(_engines(seen["engine"]["each"]))
    peers = Table(title=f"peers as {seen['name']} sees them")
    peers.add_column("peer", overflow="fold")
    for name in ("there", "age s", "run", "wait", "KV", "tariff", "stake", "ours"):
        peers.add_column(name, no_wrap=True)
    peers.add_column("API", overflow="fold")
    for each in seen["peers"]:
        age_s, kv_use = each["age_s"], each["kv_use"]
        peers.add_row(
            _who(each), "yes" if each["there"] else "no", "-" if age_s is None else f"{age_s:.1f}",
            f"{each['running']:.0f}", f"{each['waiting']:.0f}", "-" if kv_use is None else f"{kv_use:.0%}",
            _tariff(each["tariff"]), f"{each['stake']:.3g}", str(each["out"]), each["url"] or "-",
        )  # fmt: skip
    console.print(peers)
    for each in seen.get("other_versions", ()):  # which a node of an earlier release does not say
        console.print(f"{_who(each)} at {each['url']} {each['reason']}", style="yellow", markup=False)


def _engines(each: Sequence[Mapping[str, Any]]) -> Table:
    view = Table(title="engines")
    view.add_column("engine", overflow="fold")
    for name in ("takes", "run", "wait", "KV", "sent"):
        view.add_column(name, no_wrap=True)
    for one in each:
        load = (
            (f"{one['running']:.0f}", f"{one['waiting']:.0f}", f"{one['kv_use']:.0%}") if one["takes"] else ("-",) * 3
        )
        state = "yes" if one["takes"] else "full" if one["up"] else "down"
        view.add_row(one["engine"], state, *load, str(one["out"]))
    return view


def up(plan: Plan) -> None:
    """Run a network until SIGINT or SIGTERM, with a console in the browser, and a live table on a terminal; else a line
    of JSON says when it is ready. Raises as `running`."""

    def stop(number: int, frame: object) -> None:
        for each in STOPPING:  # a second one would leave processes behind
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in STOPPING:
        signal.signal(each, stop)
    console = Console()
    try:
        with running(plan) as network, network_console(network.urls, PORT if plan.base_port else 0) as url:
            if not console.is_terminal:
                print(json.dumps({"nodes": network.urls, "model": plan.model, "console": url}), flush=True)
                while True:
                    signal.pause()
            with Live(console=console, auto_refresh=False) as live:
                while True:
                    live.update(frame(network.urls, url, console.width), refresh=True)
                    time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        pass
