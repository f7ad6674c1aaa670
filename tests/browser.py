"""A headless Chromium for tests of the console."""

import base64
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"  # Debian's packages chromium and chromium-driver
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
PATIENCE_S = 60.0
SLOW_S = 120.0  # for a page or a script, where other tests keep the machine busy
WIDTH, PHONE = 1400, 390


class Browser:
    """One window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """What an element shows, "" if there is none that can be seen."""
        script = "const e = document.querySelector(arguments[0]); return e?.checkVisibility() ? e.innerText : ''"
        return str(self.run(script, selector))

    def texts(self, selector: str) -> list[str]:
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", selector))

    def until(self, what: Callable[[], Any], for_s: float = PATIENCE_S) -> float:
        """Wait for it; returns in how many seconds it came. Raises AssertionError."""
        begun_s = time.monotonic()
        while not what():
            assert time.monotonic() < begun_s + for_s, self.text("body")
            time.sleep(0.05)
        return time.monotonic() - begun_s

    def errors(self) -> list[str]:
        """What the browser complained of since the last call, and scripts with it."""
        return [f"{each['level']}: {each['message']}" for each in self.driver.get_log("browser")]

    def dark(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def phone(self, phone: bool) -> None:
        if phone:
            screen = {"width": PHONE, "height": 844, "deviceScaleFactor": 1, "mobile": True}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        else:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def wide(self, width: int) -> None:
        """As wide as that, until `phone(False)`."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def screenshot(self, path: Path, bottom: str = "", width: int = WIDTH) -> None:
        """The page from its top to the end of an element, or all of it."""
        end = (
            "return document.querySelector(arguments[0] || 'html').getBoundingClientRect().bottom + scrollY "
            "+ (arguments[0] ? 20 : 0)"
        )
        clip = {"x": 0, "y": 0, "width": width, "height": self.run(end, bottom), "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(shot["data"]))

    def loaded(self) -> dict[str, int]:
        """Bytes of each file that the page was made of, by its URL; events that go on aside."""
        script = (
            "return performance.getEntriesByType('navigation').concat(performance.getEntriesByType('resource'))"
            ".map((e) => [e.name, e.encodedBodySize])"
        )
        return {name: size for name, size in self.run(script) if not name.startswith("data:")}

    def first_paint_s(self) -> float:
        """From the start of the navigation to the first content."""
        script = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
        self.until(lambda: self.run(script) is not None)
        return float(self.run(script)) / 1000


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser, whose profile is in `folder`."""
    missing = [each for each in (CHROMIUM, DRIVER) if not Path(each).exists()]
    assert not missing, f"{' and '.join(missing)} missing: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={folder}", f"--window-size={WIDTH},1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(SLOW_S)
    driver.set_page_load_timeout(SLOW_S)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
