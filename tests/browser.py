"""A headless Chromium that looks at pages of reports."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

DEADLINE = 30.0  # seconds that a page may take to answer
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1200,900"),
)
_Found = TypeVar("_Found")


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Chromium with a profile of its own; without one the test is skipped, in continuous integration it fails."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "there is no Chromium with its driver: install the Debian packages chromium and chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Browser(session)
    finally:
        session.quit()


class Browser:
    """What tests ask of a page, by what a reader sees and does: elements, pixels, the pointer."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        """Load a page and wait until its figures can come alive."""
        self.driver.get(page.as_uri())
        self.until(lambda: "ready" in (self.run("return document.documentElement.className")).split())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def command(self, name: str, **parameters: Any) -> Any:
        """Of Chromium's DevTools."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def until(self, met: Callable[[], _Found]) -> _Found:
        """What a condition returns as soon as it is true."""
        end = time.monotonic() + DEADLINE
        while True:
            try:
                if found := met():
                    return found
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < end, "the page did not come to the state that the test waits for"
            time.sleep(0.02)

    def all(self, selector: str, within: WebElement | None = None) -> list[WebElement]:
        return (within or self.driver).find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str, within: WebElement | None = None) -> WebElement:
        [found] = self.all(selector, within)
        return found

    def texts(self, selector: str) -> list[str]:
        """Of the elements that are shown."""
        return [element.text for element in self.all(selector) if element.is_displayed()]

    def figure(self, title: str) -> WebElement:
        """The figure below a heading, in the middle of the window and drawn."""
        [found] = [figure for figure in self.all("figure") if self.all("h2, h3", figure)[0].text == title]
        self.until(lambda: self._stands_still(found) and self.all("canvas", found))
        return found

    def _stands_still(self, element: WebElement) -> bool:
        """Whether an element is where it is scrolled to, also after figures above it have come alive."""
        places = []
        for _ in range(2):
            self.run("arguments[0].scrollIntoView({block: 'center'})", element)
            places.append(self.run("return arguments[0].getBoundingClientRect().top", element))
            self.settle()
        return len({*places, self.run("return arguments[0].getBoundingClientRect().top", element)}) == 1

    def settle(self) -> None:
        """Wait until what the page has asked to be drawn is drawn."""
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 60)));"
        )

    def ink(self, figure: WebElement) -> list[dict[str, int]]:
        """Of each canvas of a figure, how many pixels have each colour, by ``r,g,b``; pixels of none are left out."""
        return self.run(
            """return [...arguments[0].querySelectorAll("canvas")].map((canvas) => {
                const counts = {};
                const { width, height } = canvas;
                const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
                copy.drawImage(canvas, 0, 0);
                const { data } = copy.getImageData(0, 0, width, height);
                for (let i = 0; i < data.length; i += 4) {
                    if (data[i + 3] < 200) continue;
                    const key = `${data[i]},${data[i + 1]},${data[i + 2]}`;
                    counts[key] = (counts[key] || 0) + 1;
                }
                return counts;
            })""",
            figure,
        )

    def place_of(self, figure: WebElement, x: float, y: float, panel: int = 0, view: int = 0) -> tuple[int, int]:
        """Where values are in the window."""
        left, top = self.run(
            """const [element, x, y, k, n] = arguments;
            const figure = figures.find((one) => one.element === element);
            const { view, container } = figure.views[n];
            const { head, above, row, bar } = figure.chart.layout;
            const [L, pw, gap, C] = ["L", "pw", "gap", "C"].map((name) => view.signal(name));
            const box = container.querySelector("canvas").getBoundingClientRect();
            const [left, top] = view.origin();
            return [
                box.left + left + L + (k % C) * (pw + gap + bar) + view.scale(`x${k}`)(x),
                box.top + top + head + above + Math.floor(k / C) * row + view.scale(`y${k}`)(y),
            ];""",
            figure,
            x,
            y,
            panel,
            view,
        )
        return round(left), round(top)

    def pointer(self, *places: tuple[int, int], pressed: bool = False) -> None:
        """Move the pointer from place to place of the window, from the first on with the button pressed."""
        actions = ActionChains(self.driver, duration=20)
        first, *others = places
        actions.w3c_actions.pointer_action.move_to_location(*first)
        if pressed:
            actions.w3c_actions.pointer_action.pointer_down()
        for place in others:
            actions.w3c_actions.pointer_action.move_to_location(*place)
        if pressed:
            actions.w3c_actions.pointer_action.pointer_up()
        actions.perform()
        self.settle()

    def double_click(self, element: WebElement) -> None:
        ActionChains(self.driver, duration=20).double_click(element).perform()
        self.settle()

    def messages(self) -> list[dict[str, Any]]:
        """Of the console, since the last call."""
        found: list[dict[str, Any]] = self.driver.get_log("browser")
        return found
