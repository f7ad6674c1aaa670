"""What a node says of itself to Prometheus."""

import asyncio
import subprocess
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from stub_nodes import Net, Stub, busy, net, play

from wwwserve.agents.protocol import MICRO
from wwwserve.serving.http.limits import KeyCounts
from wwwserve.serving.ledger.journal import Balance
from wwwserve.serving.metrics import Metrics

CLASSES = {"classes": {"chat": {"deadline_s": 20}, "batch": {"deadline_s": 600}}}
UNITS = ("seconds", "bytes", "ratio", "credits", "token", "tokens", "info", "total", "fds")


def scraped(text: str) -> dict[str, Metric]:
    """A page by names of metrics, those of counters without `_total`."""
    return {each.name: each for each in text_string_to_metric_families(text)}


async def page_of(n: Net, k: int = 0) -> tuple[str, dict[str, Metric]]:
    async with n.session.get(n.urls[k] + "/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    return text, scraped(text)


def value(metric: Metric, end: str = "", **labels: str) -> float:
    found = [each.value for each in metric.samples if each.name == metric.name + end and each.labels == labels]
    assert len(found) == 1, (metric, labels)
    return float(found[0])


def whole_page() -> str:
    """All that a node can say, with something counted under each name."""
    metrics = Metrics(("chat", "batch"))
    counts = KeyCounts(metrics.registry)
    counts.requests.labels("ci", 200).inc()
    counts.tokens.labels("ci", "prompt").inc(3)
    counts.limited.labels("ci", "requests").inc()
    counts.open.labels("ci").set(1)
    metrics.ended(1, "answered", "peer", 2.0, True)
    metrics.streamed(1, "peer", 0.5, 1.0, 5)
    metrics.prefix(False, 10, 12, 20)
    metrics.message_refused("stale")
    metrics.duel("tie")
    metrics.duelled("peer", True)
    metrics.judged("voted")
    balance = Balance("peer", 2 * MICRO, MICRO, 0, MICRO, 0)
    page = metrics.page(
        held=1, engine_up=True, engines={"engine:8000": (1, 2, 1, 0.5)}, peers=1, peers_known=2, tariff=(0.1, 0.01, 0.5),
        balances=[balance], disputed={"peer": 0},
    )  # fmt: skip
    return page.decode()


def rows() -> list[str]:
    """The table of the page that documents it."""
    found = ["| metric | type | by | |", "|---|---|---|---|"]
    for metric in scraped(whole_page()).values():
        if metric.name.startswith("wwwserve_"):
            labels = sorted({label for each in metric.samples for label in each.labels} - {"le"})
            name = metric.name + ("_total" if metric.type == "counter" else "")
            by = ", ".join(f"`{label}`" for label in labels)
            found.append(f"| `{name}` | {metric.type} | {by} | {metric.documentation.rstrip('.')} |")
    return found


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    page = (Path(__file__).parent.parent / "docs/observability.md").read_text()
    assert "\n".join(rows()) in page, "\n".join(rows())


def test_names_units_help_and_types_are_as_promtool_wants_them() -> None:
    found = subprocess.run(["promtool", "check", "metrics"], input=whole_page(), text=True, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_every_metric_is_told_in_a_sentence_and_names_its_unit() -> None:
    for name, metric in scraped(whole_page()).items():
        assert metric.documentation.endswith("."), name
        if metric.type == "histogram" or name.startswith(("wwwserve_tariff", "wwwserve_markup", "wwwserve_margin")):
            assert name.endswith(UNITS), name
        assert not name.endswith(("_ms", "_ktok", "_percent", "_created")), name


@pytest.mark.parametrize("place", ["local", "peer"])
def test_times_are_by_class_and_by_where_a_request_ran(place: str) -> None:
    async def scene() -> None:
        stubs = [Stub(tokens=5, pause_s=0.05)] if place == "local" else [busy(), Stub(tokens=5, pause_s=0.05)]
        async with net(*stubs, **CLASSES) as n:
            for stream in (True, False):
                status, _, _ = await n.ask(stream=stream, headers={"x-slo-class": "batch"})
                assert status == 200
            _, page = await page_of(n)
            at = {"class": "batch", "where": place}
            latency, ttft, tpot = (
                page[f"wwwserve_{name}_seconds"]
                for name in ("request_latency", "time_to_first_token", "time_per_output_token")
            )
            assert value(latency, "_count", **at) == 2
            assert value(ttft, "_count", **at) == value(tpot, "_count", **at) == 1, "of what is streamed alone"
            first_s, token_s, all_s = (value(each, "_sum", **at) for each in (ttft, tpot, latency))
            assert first_s > 0 and token_s >= 0.05  # 5 pauses for 4 tokens after the first
            assert first_s + 4 * token_s <= all_s - 0.25, "which the other one took"
            others = [(k, w) for k in ("chat", "batch") for w in ("local", "peer") if (k, w) != ("batch", place)]
            for klass, where in others:
                assert all(value(m, "_count", **{"class": klass, "where": where}) == 0 for m in (latency, ttft, tpot))
            ended = page["wwwserve_requests_ended"]
            assert value(ended, "_total", **at, outcome="answered") == 2
            assert value(page["wwwserve_requests_on_time"], "_total", **{"class": "batch"}) == 2

    play(scene)


def test_the_first_token_is_one_with_text_and_a_resumed_stream_keeps_its_first() -> None:
    """A stub streams its role at once and goes on elsewhere after two words."""

    async def scene() -> None:
        async with net(Stub(mode="breaks off", pause_s=0.2, breaks=1), resume=True) as n:
            status, body, _ = await n.ask(stream=True)
            assert status == 200 and b"w4" in body
            _, page = await page_of(n)
            at = {"class": "default", "where": "local"}
            latency, ttft, tpot = (
                page[f"wwwserve_{name}_seconds"]
                for name in ("request_latency", "time_to_first_token", "time_per_output_token")
            )
            rest_s = value(latency, "_sum", **at) - value(ttft, "_sum", **at)
            assert rest_s >= 1.0, "5 pauses, of which two were before it broke off"
            assert value(tpot, "_count", **at) == 1
            assert value(tpot, "_sum", **at) == pytest.approx(rest_s / 4, abs=0.02), "of 4 more tokens"

    play(scene)


def test_an_answer_without_a_token_has_no_time_to_the_first() -> None:
    async def scene() -> None:
        async with net(Stub(mode="400")) as n:
            status, _, _ = await n.ask(stream=True)
            assert status == 400
            _, page = await page_of(n)
            at = {"class": "default", "where": "local"}
            assert value(page["wwwserve_time_to_first_token_seconds"], "_count", **at) == 0

    play(scene)


def test_counts_begin_at_nothing_so_that_the_first_one_shows_in_a_rate() -> None:
    page = scraped(Metrics(("chat",)).page(
        held=0, engine_up=False, engines={"engine:8000": (0, 8, 1000, 1)}, peers=0, peers_known=0
    ).decode())  # fmt: skip
    ended = page["wwwserve_requests_ended"]
    for outcome, where in (("answered", "local"), ("answered", "peer"), ("failed", "nowhere"), ("cancelled", "peer")):
        assert value(ended, "_total", **{"class": "chat", "outcome": outcome, "where": where}) == 0
    assert value(page["wwwserve_engine_takes_requests"]) == 0
    for name in ("wwwserve_engine_kv_cache_usage_ratio", "wwwserve_engine_requests"):
        assert page[name].samples == [], "nothing is known of an engine that is down"


def test_the_page_has_the_load_of_the_engine_and_who_is_missing() -> None:
    async def scene() -> None:
        async with net(Stub(waiting=3), Stub()) as n:
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)

            async def gone() -> bool:
                return value((await page_of(n))[1]["wwwserve_peers"]) == 0

            await n.until(gone)
            _, page = await page_of(n)
            assert value(page["wwwserve_peers_known"]) == 1
            assert sum(each.value for each in page["wwwserve_engine_requests"].samples) == 3
            assert value(page["process_resident_memory_bytes"]) > 1e7
            n.running[0].cancel()
            await asyncio.gather(n.running[0], return_exceptions=True)
            await n.start(0)
            _, page = await page_of(n)
            assert value(page["wwwserve_peers_known"]) == 1, "one that was never there is known by node.yaml"

    play(scene)
