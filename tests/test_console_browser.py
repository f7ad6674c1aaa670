"""The console in a headless Chromium: it loads, is live, shows who is gone, and is nobody's but the node's.

With WWWSERVE_SCREENSHOTS=FOLDER the pictures of docs/console.md are written there.
"""

import asyncio
import contextlib
import json
import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from browser import PHONE, WIDTH, Browser, chromium
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from stub_nodes import PROFILE, Net, Stub, busy, net, play

from wwwserve.serving import overview
from wwwserve.serving.console import node as console_node
from wwwserve.serving.console.app import STATIC
from wwwserve.serving.console.broadcast import LOOK_S
from wwwserve.serving.console.network import network_console
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.local_nodes import Accounts, Network, Plan, configurations, free_ports, started
from wwwserve.serving.membership.heartbeat import BEAT_S, SILENT_S, Unspoken
from wwwserve.serving.versions import Versions

MODEL = "qwen3-8b"
HOSTILE = "<img src=x onerror=window.hacked=1></script>&lt;\"'${1}"
NAMES = ("north", "south", "west")
PLAN = Plan(nodes=3, base_port=0, policy=None, gpu="rtx-4090", model=MODEL, max_num_seqs=2, speed=5.0)
MOST_BYTES = 300_000
TRIES = 25
ROWS = "#peers tbody tr"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Three nodes with ledgers, and users, most of them of the first."""
    nodes, engines = configurations(PLAN)
    for node, name in zip(nodes, NAMES, strict=True):
        node["name"] = name
        node["output"] = {"median": 120.0, "sigma": 0.6, "max": 300}
        node["classes"] = {"chat": {"deadline_s": 20.0, "value": 3.0}, "batch": {"deadline_s": 120.0}}
    with started(nodes, engines, accounts=Accounts(1000.0, 10.0, 100.0)) as made:
        enough = threading.Event()
        users = threading.Thread(target=lambda: asyncio.run(ask(made.urls, enough)))
        users.start()
        try:
            yield made
        finally:
            enough.set()
            users.join()


async def ask(urls: list[str], enough: threading.Event) -> None:
    """Sessions of users, most of them of the first node, until it is enough."""

    async def session(client: aiohttp.ClientSession, k: int) -> None:
        messages: list[dict[str, str]] = []
        for turn in range(1 + k % 4):
            messages.append({"role": "user", "content": f"Question {k} {turn}. " * (10 + k % 30)})
            body = {"model": MODEL, "messages": messages, "max_tokens": 100 + 60 * (k % 5)}
            klass = {"x-slo-class": "batch" if k % 3 == 0 else "chat"}
            try:
                async with client.post(f"{urls[k % 5 == 4]}/v1/chat/completions", json=body, headers=klass) as response:
                    answer = json.loads(await response.read())
            except (aiohttp.ClientError, ValueError):
                return
            if response.status == 200:
                messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60.0)) as client, asyncio.TaskGroup() as group:
        k = 0
        while not enough.is_set():
            group.create_task(session(client, k))
            k += 1
            await asyncio.sleep(0.35)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def page(network: Network, browser: Browser) -> Browser:
    """The console of the first node, which has decided on something."""
    browser.open(network.urls[0])
    browser.until(lambda: browser.text("#state-text") == "Live" and browser.texts("#decisions li"))
    return browser


def row(browser: Browser, name: str) -> str:
    """What the table says of a peer."""
    return next((each for each in browser.texts(ROWS) if each.startswith(name)), "")


def place_of(row: str) -> str:
    """What stands first in a row."""
    return re.split(r"[\n\t]", row)[0].strip()


def pictures(browser: Browser, name: str, bottom: str = "", width: int = WIDTH) -> None:
    if folder := os.environ.get("WWWSERVE_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{name}.png", bottom, width)


def leave(browser: Browser) -> None:
    """Close a page whose node will be gone, so that it does not go on asking for it."""
    browser.open("about:blank")
    browser.errors()


def with_admin(browser: Browser, then: Callable[[Net, str, Any], None], key: str | None) -> None:
    """Do something with a node whose operator's pages are on a listener of their own."""
    port = free_ports(1)[0]

    async def scene() -> None:
        async with net(Stub()) as n:
            await restart(n, {"port": port} | ({"key": key} if key is not None else {}))
            loop = asyncio.get_running_loop()
            await asyncio.to_thread(then, n, f"http://127.0.0.1:{port}", loop)
            await asyncio.to_thread(leave, browser)

    play(scene)


async def restart(n: Net, admin: dict[str, Any]) -> None:
    await stop(n)
    n.configs[0]["admin"] = admin
    await n.start(0)


async def stop(n: Net, k: int = 0) -> None:
    n.running[k].cancel()
    await asyncio.gather(n.running[k], return_exceptions=True)


def test_it_is_small_and_there_at_once_and_asks_nobody_else(browser: Browser) -> None:
    def scene(n: Net, url: str, loop: Any) -> None:
        paints_s: list[float] = []
        while min(paints_s, default=9.0) >= 1.0 and len(paints_s) < TRIES:  # other tests may keep this machine busy
            browser.open(url)
            browser.until(lambda: browser.text("#state-text") == "Live")
            paints_s.append(browser.first_paint_s())
            loaded = browser.loaded()
            assert all(each.startswith(url) for each in loaded)
            assert 80_000 < sum(loaded.values()) < MOST_BYTES
        assert min(paints_s) < 1.0, paints_s
        assert browser.errors() == []

    with_admin(browser, scene, None)


def test_it_is_live_and_says_why(page: Browser, network: Network) -> None:
    def answered() -> int:
        with urllib.request.urlopen(f"{network.urls[0]}/network") as response:
            return int(json.load(response)["requests"]["answered"])

    assert page.text("#name") == "north" and page.text("#engine-state") == "● engine up"
    before, shown = answered(), page.texts(".tile")
    page.until(lambda: answered() > before + 3 and page.texts(".tile") != shown)
    assert re.search(r"of [\d,]+ in the last minute", page.texts(".tile")[0])
    assert set(map(place_of, page.texts(ROWS))) == {"south", "west"}

    page.until(lambda: page.run("return [...document.querySelectorAll('#decisions .to.peer')].length") > 0)
    page.run("document.querySelector('#decisions .to.peer').closest('button').click()")
    chosen = page.text("#decisions [aria-pressed=true] .to")
    assert chosen in ("south", "west") and page.text("#why-title") == f"Why {chosen}"
    places = page.texts("#places tbody tr")
    taken = [each for each in places if each.startswith("✓")]
    assert [place_of(each) for each in taken] == [f"✓ {chosen}"]
    assert {"own engine", "hold"} <= set(map(place_of, places))
    probable = [float(found) for each in places for found in re.findall(r"^([\d.]+) %", each.partition("\t")[2])[:1]]
    assert chosen in page.text("#why-text") and "likely in time" in page.text("#why-text")
    assert 95 <= sum(probable) <= 105
    page.run("document.querySelector('#all summary').click()")
    page.until(lambda: len(page.texts("#everything tbody tr")) > 25)
    page.run("document.getElementById('follow').click()")
    page.until(lambda: page.run("return document.getElementById('follow').hidden"))

    page.until(lambda: "paid" in row(page, "south") and "answered" in row(page, "south"))
    assert len(page.texts("#channels tbody tr")) == 2 and "credits" not in page.text("#money-none")
    assert "Duels are off" in page.text("#duels-sum")
    assert page.errors() == []


def test_the_keyboard_is_enough(page: Browser) -> None:
    """All that can be used is reached with the tab key, has a name, and does the same by enter and by click."""
    nameless = page.run(
        "return [...document.querySelectorAll('a, button, input, summary, [tabindex=\"0\"]')].filter((e) => "
        "!(e.innerText || e.getAttribute('aria-label') || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert nameless == []
    reached = set()
    page.run("document.activeElement?.blur()")
    for _ in range(40):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        reached.add(page.run("const e = document.activeElement; return e.closest('[id]')?.id + ' ' + e.tagName"))
        if page.run("return document.activeElement.matches('.node:not(.own)')"):
            ActionChains(page.driver).send_keys(Keys.ENTER).perform()
            name = page.run("return document.activeElement.querySelector('.label').textContent")
            page.until(lambda name=name: page.text("tr.pointed").startswith(name[:12]), 5.0)
        if page.run("return document.activeElement.matches('#decisions button')"):
            break
    assert {"peers DIV", "decisions BUTTON", "graph g"} <= reached
    first = page.run("return document.activeElement.closest('li').innerText")
    ActionChains(page.driver).send_keys(Keys.ARROW_DOWN).perform()
    below = page.run("return document.activeElement.closest('li').innerText")
    assert page.text("#decisions [aria-pressed=true]") == below and (below != first or below)
    assert page.errors() == []


def test_it_fits_a_phone_and_the_dark(page: Browser) -> None:
    page.until(lambda: "answered" in row(page, "south"))
    if "WWWSERVE_SCREENSHOTS" in os.environ:
        time.sleep(60.0)  # of which the charts show something
        page.run("document.querySelector('#decisions .to.peer')?.closest('button').click()")
        time.sleep(1.0)
    pictures(page, "console", "#decisions-section")
    light = page.run("return getComputedStyle(document.body).backgroundColor")
    try:
        page.dark(True)
        page.until(lambda: page.run("return getComputedStyle(document.body).backgroundColor") != light, 5.0)
        pictures(page, "console-dark", "#decisions-section")
        page.phone(True)
        page.until(lambda: page.run("return innerWidth") == PHONE, 5.0)
        time.sleep(1.2)
        assert page.run("return document.documentElement.scrollWidth") <= PHONE
        assert page.run("return getComputedStyle(document.querySelector('#peers tbody tr')).display") == "grid"
        pictures(page, "console-phone-dark", width=PHONE)
    finally:
        page.dark(False)
        page.phone(False)
    assert page.errors() == []


def test_one_token_is_one(page: Browser) -> None:
    said = "return import('/console/format.js').then(({ tokens }) => [0, 1, 2, 12345].map(tokens))"
    assert page.run(said) == ["0 tokens", "1 token", "2 tokens", "12.3 k tokens"]


def test_numbers_fill_their_rows(page: Browser) -> None:
    ends = (
        "const all = document.getElementById('tiles').getBoundingClientRect(), ends = new Map();"
        "for (const tile of document.querySelectorAll('.tile')) {"
        "const { top, right } = tile.getBoundingClientRect(); ends.set(Math.round(top), Math.round(all.right - right));"
        "} return [...ends.values()]"
    )
    try:
        for width, rows in ((1265, 1), (1000, 2), (760, 2)):  # the first: a window of 1280 with a bar to scroll
            page.wide(width)
            page.until(lambda width=width: page.run("return innerWidth") == width, 5.0)
            left = page.run(ends)
            assert len(left) == rows and max(left) <= 2, (width, left)
            cut = "return [...document.querySelectorAll('.tile dd')].filter((e) => e.scrollWidth > e.clientWidth)"
            assert page.run(cut) == []
    finally:
        page.phone(False)
    assert page.errors() == []


def test_a_killed_peer_is_shown_here_and_on_the_networks_page(page: Browser, network: Network) -> None:
    west = network.nodes[NAMES.index("west")]
    with network_console(network.urls, 0) as url:
        here = page.driver.current_window_handle
        page.driver.switch_to.new_window("tab")
        try:
            other = page.driver.current_window_handle
            page.open(url)
            page.until(lambda: page.text("#network-state") == "● 3 up" and len(page.texts("#nodes a")) == 3)
            assert "since this page is open" in page.texts(".tile .note")[1]  # of before, it knows nothing
            page.until(lambda: re.fullmatch(r"[\d.]+/s", page.texts(".tile .big")[2]))
            page.driver.switch_to.window(here)
            page.until(lambda: "● there" in row(page, "west"))
            west.kill()
            page.until(lambda: "✕ gone" in row(page, "west"))
            assert SILENT_S + BEAT_S + LOOK_S < 3.0  # within which it is shown where the machine has time
            page.until(lambda: "west is gone" in page.text("#events"))
            assert "gone" in page.run("return document.querySelector('.node.gone').textContent")
            page.driver.switch_to.window(other)
            page.until(lambda: page.text("#network-state") == "▲ 1 of 3 down")
            page.until(lambda: "✕ does not answer" in page.text("#nodes tr.gone"))
            if "WWWSERVE_SCREENSHOTS" in os.environ:
                time.sleep(30.0)
                pictures(page, "console-network")
            assert page.errors() == []
            page.driver.close()
        finally:
            page.driver.switch_to.window(here)
    assert page.errors() == []


def test_what_a_peer_calls_itself_is_text(browser: Browser) -> None:
    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            await stop(n, 1)
            n.configs[1]["name"] = HOSTILE
            await n.start(1)
            await asyncio.to_thread(browser.open, n.urls[0])
            await asyncio.to_thread(browser.until, lambda: HOSTILE in browser.text("#peers"))
            assert (await n.ask())[0] == 200
            await asyncio.to_thread(browser.until, lambda: HOSTILE in browser.text("#why-title"))
            labels = "return [...document.querySelectorAll('.graph .label')].map((e) => e.textContent)"
            assert f"{HOSTILE[:15]}…" in browser.run(labels)
            assert browser.run("return window.hacked ?? null") is None
            assert browser.run("return document.querySelectorAll('img, main script').length") == 0
            assert browser.errors() == []
            leave(browser)

    play(scene)


def test_peers_of_another_version_are_shown_as_such(browser: Browser) -> None:
    """One that was a peer before it spoke another version, and one that was never more than a name."""

    async def scene() -> None:
        async with net(Stub(), Stub()) as n:
            await stop(n, 1)

            def others(node: Dispatcher) -> dict[str, Unspoken]:
                now_s = asyncio.get_running_loop().time()
                return {
                    n.keys[1].name: Unspoken("n1", "http://127.0.0.1:1", Versions(9, 11), now_s),
                    "k" * 43: Unspoken(HOSTILE, "http://127.0.0.1:2", Versions(1, 1), now_s),
                }

            seen = overview.overview

            def with_others(node: Dispatcher, most: int | None = None) -> dict[str, Any]:
                node.membership.unspoken = lambda: others(node)  # type: ignore[method-assign]
                return seen(node, most)

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(console_node, "overview", with_others)
                await asyncio.to_thread(browser.open, n.urls[0])
                await asyncio.to_thread(browser.until, lambda: len(browser.texts(ROWS)) == 2)
                for name, advised in (("n1", "upgrade this node"), (HOSTILE, "upgrade it")):
                    said = await asyncio.to_thread(row, browser, name)
                    assert "▲ other version" in said and advised in said
                assert "kkkkkkkk" in browser.text("#peers") and browser.errors() == []
                with network_console(n.urls[:1], 0) as url:  # the page of the network names them, too
                    await asyncio.to_thread(browser.open, url)
                    await asyncio.to_thread(browser.until, lambda: len(browser.texts("#others tbody tr")) == 2)
                    said = browser.texts("#others tbody tr")
                    assert "n1" in said[0] and "n0" in said[0] and "upgrade this node" in said[0]
                    assert HOSTILE in said[1] and "▲ other version" in said[1] and "upgrade it" in said[1]
                    assert browser.errors() == []
                leave(browser)

    play(scene)


def test_several_engines_are_shown_and_which_of_them_is_down(browser: Browser) -> None:
    async def scene() -> None:
        stays, goes = Stub(), Stub()
        async with stays.served(), contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(goes.served())
            engine = {"url": [stays.url, goes.url], "profile": PROFILE}
            async with net(Stub(), engine=engine) as n:

                def state(said: str) -> Callable[[], bool]:
                    return lambda: said in browser.text("#engine-state")

                await asyncio.to_thread(browser.open, n.urls[0])
                await asyncio.to_thread(browser.until, state("● 2 of 2 engines up"))
                assert browser.texts("#engines tbody th .value") == [stays.url[7:], goes.url[7:]]
                await stack.aclose()
                await asyncio.to_thread(browser.until, state("▲ 1 of 2 engines up"))
                assert "✕ down" in browser.text("#engines") and goes.url[7:] in browser.text("#engine-reason")
                assert browser.errors() == []
                leave(browser)

    play(scene)


# One node, which comes and goes.


def test_with_a_key_the_page_asks_for_it(browser: Browser) -> None:
    def scene(n: Net, url: str, loop: Any) -> None:
        browser.open(url)
        browser.until(lambda: browser.text("#state-text") == "Locked")
        assert not browser.text("main") and "admin.key" in browser.text("#unlock")
        field = browser.driver.switch_to.active_element
        field.send_keys("wrong" + Keys.ENTER)
        browser.until(lambda: browser.text("#unlock-error") == "that key is not the right one")
        browser.driver.switch_to.active_element.send_keys("secret" + Keys.ENTER)
        browser.until(lambda: browser.text("#state-text") == "Live")
        assert browser.text("#name") == "n0" and not browser.text("#unlock")
        assert "No peers yet" in browser.text("#peers") and "no ledger" in browser.text("#money-none")
        assert "No decision yet" in browser.text("#decisions-none")
        browser.open(url)
        browser.until(lambda: browser.text("#state-text") == "Live")  # the tab knows it still
        refused = [each for each in browser.errors() if "401" not in each]
        assert refused == []

    with_admin(browser, scene, "secret")


def test_it_says_when_the_node_is_gone_and_goes_on_when_it_is_back(browser: Browser) -> None:
    def scene(n: Net, url: str, loop: Any) -> None:
        browser.open(url)
        browser.until(lambda: browser.text("#state-text") == "Live")
        begun_s = time.monotonic()
        asyncio.run_coroutine_threadsafe(stop(n), loop).result(30.0)
        assert time.monotonic() - begun_s < 4.0  # no open console holds a node up
        browser.until(lambda: browser.text("#state-text") == "Disconnected", 5.0)
        assert re.search(r"trying again in \d s, shown is \d\d:\d\d:\d\d", browser.text("#state-detail"))
        asyncio.run_coroutine_threadsafe(n.start(0), loop).result(30.0)
        browser.until(lambda: browser.text("#state-text") == "Live", 20.0)
        assert [each for each in browser.errors() if "ERR_" not in each and "503" not in each] == []

    with_admin(browser, scene, None)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(scheme: str) -> None:
    """Contrast is at least 4.5 to 1, as WCAG 2 asks for."""
    light, dark = re.findall(r":root \{(.*?)\}", (STATIC / "console.css").read_text(), re.S)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))

    def luminance(colour: str) -> float:
        shares = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for text in ("ink", "muted", "accent", "good", "bad", "warn"):
        for behind in ("paper", "panel", "tint"):
            one, other = sorted((luminance(colours[text]), luminance(colours[behind])))
            assert (other + 0.05) / (one + 0.05) >= 4.5, (text, behind)
