"""What docs/deploy has for Prometheus and Grafana: a real Prometheus reads it, and real nodes."""

import asyncio
import json
import math
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from wwwserve.serving.local_nodes import (
    DIRECT,
    Accounts,
    Command,
    Network,
    Plan,
    Process,
    configurations,
    free_ports,
    listens,
    local_urls,
    programs,
    started,
)
from wwwserve.serving.metrics import Metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "docs/deploy"
BOARD = json.loads((DEPLOY / "board.json").read_text())
VARIABLES = {"$instance": ".*", "$__rate_interval": "1m"}
FAULTS = "Faults:"  # what a panel's title begins with that may be empty while all is well
NODES = 3
KEY = "sesame"


def promtool(*command: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, command)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def targets() -> list[tuple[str, str]]:
    """The queries of the board, each with the title of its panel."""
    found = []
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            found.append((panel["title"], query))
    return found


def test_prometheus_takes_the_configuration_and_the_alerts(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "alerts.yml"):
        (tmp_path / name).write_bytes((DEPLOY / name).read_bytes())
    (tmp_path / "admin.key").write_text("its file has to be there")
    assert "SUCCESS" in promtool("check", "config", tmp_path / "prometheus.yml")


def test_every_alert_fires_and_none_fires_where_all_is_well() -> None:
    promtool("test", "rules", ROOT / "tests/alerts.yml")
    [group] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    [case] = yaml.safe_load((ROOT / "tests/alerts.yml").read_text())["tests"]
    page = (ROOT / "docs/observability.md").read_text()
    told = re.findall(r"^\| `(Wwwserve\w+)`", page, re.M)
    assert sorted(told) == sorted(rule["alert"] for rule in group["rules"])
    before, after = case["promql_expr_test"]
    fired = [re.findall(r'"(\w+)"', each["labels"]) for each in after["exp_samples"]]
    assert fired == [[rule["alert"], "ill"] for rule in group["rules"]] and "exp_samples" not in before
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning") and rule["annotations"].keys() == {
            "summary", "description"
        }, rule["alert"]  # fmt: skip


def test_the_test_of_alerts_can_fail(tmp_path: Path) -> None:
    for name in ("alerts.yml", "prometheus.yml"):
        text = (DEPLOY / name).read_text().replace("wwwserve_ledger_full == 1", "wwwserve_ledger_full == 2")
        (tmp_path / name).write_text(text)
    test = (ROOT / "tests/alerts.yml").read_text().replace("../docs/deploy/", f"{tmp_path}/")
    (tmp_path / "test.yml").write_text(test)
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
    assert done.returncode != 0 and "WwwserveLedgerFull" in done.stdout + done.stderr


def test_names_on_the_board_and_in_alerts_are_those_of_the_code() -> None:
    there = {
        name
        for metric in Metrics().registry.collect()
        for kind in ("", "_total", "_bucket", "_sum", "_count")
        if (name := metric.name + kind)
    } | {f"wwwserve_key_{each}" for each in ("requests_total", "tokens_total", "limited_total", "requests_open")}
    text = (DEPLOY / "alerts.yml").read_text() + "".join(query for _, query in targets())
    used = set(re.findall(r"\bwwwserve_[a-z_]+", text))
    assert used and used <= there, used - there


def test_the_board_is_one_that_grafana_takes() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) and BOARD["uid"] and BOARD["schemaVersion"] >= 36
    places = [tuple(panel["gridPos"][side] for side in "xywh") for panel in panels]
    for x, y, w, h in places:
        assert x + w <= 24
        over = [p for p in places if p[0] < x + w and x < p[0] + p[2] and p[1] < y + h and y < p[1] + p[3]]
        assert over == [(x, y, w, h)], "panels lie over each other"
    variables = {each["name"] for each in BOARD["templating"]["list"]}
    assert variables == {"datasource", "instance"}
    for panel in panels:
        assert panel["type"] in ("row", "stat", "timeseries")
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"


@contextmanager
def prometheus(folder: Path, ports: list[int]) -> Iterator[tuple[str, Process]]:
    """Prometheus as docs/deploy has it, but for whom it asks and how often; it ends with the context."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [job] = config["scrape_configs"]
    del job["authorization"]  # of nodes without a page of their own for the operator
    job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "alerts.yml").write_bytes((DEPLOY / "alerts.yml").read_bytes())
    [port] = free_ports(1)
    argv = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with programs() as made:
        process = made.start("prometheus", Command(argv))
        [url] = local_urls([port])
        made.wait([url], listens, 60.0)
        yield url, process


def ask(url: str, query: str) -> list[dict[str, Any]]:
    """What Prometheus says to a query now."""
    path = "/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with DIRECT.open(urllib.request.Request(url + path), timeout=10.0) as response:
        said = json.load(response)
    assert said["status"] == "success", (query, said)
    found: list[dict[str, Any]] = said["data"]["result"]
    return found


def numbers(url: str, query: str) -> list[float]:
    return [x for each in ask(url, query) if math.isfinite(x := float(each["value"][1]))]


async def users(network: Network, model: str, stop: asyncio.Event) -> None:
    """Ask the first node for more than its engine takes, in conversations, streamed and not."""
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session:

        async def one(k: int) -> None:
            messages = [{"role": "system", "content": f"You are number {k}. " * 30}]
            while not stop.is_set():
                messages = [*messages[:9], {"role": "user", "content": "And then? " * 10}]
                asked = {"model": model, "messages": messages, "max_tokens": 40, "stream": k % 3 > 0}
                async with session.post(
                    network.urls[0] + "/v1/chat/completions", json=asked,
                    headers={"x-slo-class": ("chat", "batch")[k % 2]},
                ) as response:  # fmt: skip
                    await response.read()
                messages.append({"role": "assistant", "content": "So it was. " * 10})

        await asyncio.gather(*(one(k) for k in range(24)))


def test_every_query_of_the_board_finds_what_real_nodes_say(tmp_path: Path) -> None:
    model, policy = "qwen3-8b", "earliest_finish"
    nodes, engines = configurations(Plan(NODES, 0, policy, "rtx-4090", model, 4, 10.0))
    classes = {"chat": {"deadline_s": 30, "value": 2}, "batch": {"deadline_s": 600}}
    nodes = [node | {"classes": classes, "keys": [{"name": "test", "key": KEY}]} for node in nodes]

    async def scene(network: Network, url: str) -> dict[str, str]:
        stop = asyncio.Event()
        asking = asyncio.create_task(users(network, model, stop))
        missing = {query: title for title, query in targets() if not title.startswith(FAULTS)}
        try:
            for _ in range(120):
                await asyncio.sleep(1.0)
                assert not asking.done(), asking
                found = [query for query in missing if await asyncio.to_thread(numbers, url, query)]
                missing = {query: title for query, title in missing.items() if query not in found}
                if not missing:
                    break
        finally:
            stop.set()
            await asking
        return missing

    with started(nodes, engines, accounts=Accounts(1000.0, 10.0, 100.0)) as network:
        with prometheus(tmp_path, [node["port"] for node in nodes]) as (url, process):
            assert asyncio.run(scene(network, url)) == {}
            until_s = time.monotonic() + 60.0
            while sorted(numbers(url, 'up{job="wwwserve"}')) != [1.0] * NODES:  # a scrape may take a busy node too long
                assert time.monotonic() < until_s
                time.sleep(0.5)
            for title, query in targets():
                if title.startswith(FAULTS):
                    ask(url, query)
            with pytest.raises(urllib.error.HTTPError):
                ask(url, "sum(")
            names = DIRECT.open(url + "/api/v1/label/instance/values", timeout=10.0).read()
            assert len(json.loads(names)["data"]) == NODES
            classes_seen = {each["metric"]["class"] for each in ask(url, "wwwserve_request_latency_seconds_count > 0")}
            assert classes_seen == {"chat", "batch"}
        assert process.poll() is not None and not listens(url), "Prometheus has ended"
