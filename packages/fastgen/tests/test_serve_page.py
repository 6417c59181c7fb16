"""The chat page in a real browser: it streams, stops, shows speed and load, and loads nothing from anywhere else."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from fastgen.request import SamplingParams
from server_lab import Served, serving, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PAGE = Path(__file__).parents[1] / "src/fastgen/serve/chat.html"
ANSWER = (
    "A shard is one rank's part of a flat buffer.\n\n"
    "```python\nsize = -(-numel // world)\nshard = flat[rank * size :][:size]\n```\n"
    "Every rank holds 1/N of it; a gather makes it whole again, around use.\n\n"
    "Nothing else is copied: parameters are views into the buffer, and <b>gradients</b> land in another.\n"
)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = PAGE.read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", html)
    assert not re.findall(r"https?://|@import|url\(", html)
    assert not re.findall(r"""\son\w+\s*=|\sstyle\s*=|innerHTML""", html)
    # Every field has a label.
    fields = re.findall(r'<(?:input|select|textarea)[^>]*id="(\w+)"', html)
    wrapped = re.findall(
        r'<label>[^<]*(?:<output[^>]*></output>\s*)?<(?:input|select|textarea)[^>]*id="(\w+)"', html
    )
    named = re.findall(r'<label[^>]*for="(\w+)"', html)
    assert set(fields) == {*wrapped, *named}


def reply(prompt: str, params: SamplingParams, index: int) -> str:
    return ANSWER if "shard" in prompt else "Hm. " * 300


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    engine = FakeEngine(step_s=0.004, reply=reply)
    engine.model_name = "llama-125m"
    with serving(engine, adapters=("pirate",)) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no browser here: install Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def open_page(browser: Any, served: Served, width: int = 1100, height: int = 860) -> None:
    browser.set_window_size(width, height)
    browser.get(served.url)
    wait_until(lambda: text(browser, "#model") != "")


def text(browser: Any, selector: str) -> str:
    return str(
        browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
    )


def say(browser: Any, what: str) -> None:
    browser.find_element("id", "text").send_keys(what + "\n")


def complaints(browser: Any) -> list[str]:
    return [
        entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ]


def set_value(browser: Any, field: str, value: str) -> None:
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));",
        field,
        value,
    )


def test_a_conversation(browser: Any, served: Served) -> None:
    open_page(browser, served)
    for field, value in {
        "system": "Be brief.",
        "temperature": "0.35",
        "top_p": "0.9",
        "max_tokens": "2000",
    }.items():
        set_value(browser, field, value)
    set_value(browser, "seed", "11")
    set_value(browser, "model", "pirate")
    say(browser, "What is a shard?")
    # It grows while it comes.
    wait_until(lambda: 20 < len(text(browser, ".turn.assistant .body")) < 300)
    wait_until(lambda: text(browser, "#running") == "1")
    wait_until(lambda: "%" in text(browser, "#cache-percent"))
    wait_until(lambda: not browser.find_elements("css selector", ".live"), 20)
    shown = text(browser, ".turn.assistant .body")
    assert shown == re.sub(r"```\w*\n?", "", ANSWER)  # <b> is shown, not obeyed
    assert "size = -(-numel // world)" in text(browser, ".turn.assistant pre")
    foot = text(browser, ".turn.assistant .foot")
    assert re.match(rf"{len(ANSWER)} tokens · \d+\.\d tokens/s · first after \d", foot)
    assert float(text(browser, "#speed")) > 5
    seen = served.engine.seen[-1]
    params = seen["params"]
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.35, 0.9, 2000, 11)
    assert seen["adapter"] == "pirate"
    if os.environ.get("FASTGEN_SCREENSHOT"):
        browser.save_screenshot(os.environ["FASTGEN_SCREENSHOT"])
    # The next turn knows the first.
    set_value(browser, "max_tokens", "5")
    say(browser, "Go on about the shard")
    wait_until(lambda: len(browser.find_elements("css selector", ".turn.assistant")) == 2)
    wait_until(lambda: not browser.find_elements("css selector", ".live"))
    told = served.engine.tokenizer.decode(served.engine.seen[-1]["prompt_ids"])
    assert told.startswith(
        "<|system|>Be brief.<|end|>\n<|user|>What is a shard?<|end|>\n<|assistant|>A shard is"
    )
    assert "cut at the most tokens" in browser.find_elements("css selector", ".foot")[-1].text
    assert complaints(browser) == []


def test_stop_and_try_again(browser: Any, served: Served) -> None:
    open_page(browser, served)
    set_value(browser, "max_tokens", "1200")
    aborted = served.engine.num_aborted
    say(browser, "Think long")
    wait_until(lambda: len(text(browser, ".turn.assistant .body")) > 20)
    browser.find_element("id", "stop").click()
    wait_until(served.is_idle)
    assert served.engine.num_aborted == aborted + 1
    wait_until(lambda: "stopped" in text(browser, ".turn.assistant .foot"))
    browser.find_element("css selector", ".retry").click()
    wait_until(lambda: len(served.engine.requests) == 1)
    browser.find_element("id", "text").send_keys("\ue00c")  # Escape
    wait_until(served.is_idle)
    assert len(browser.find_elements("css selector", ".turn.assistant")) == 1
    browser.find_element("id", "new").click()
    assert not browser.find_elements("css selector", ".turn")


def test_errors_are_told(browser: Any, served: Served) -> None:
    open_page(browser, served)
    set_value(browser, "system", "")
    set_value(browser, "max_tokens", "100000")
    say(browser, "Hello")
    wait_until(lambda: "max_tokens: expected at most" in text(browser, ".turn.failed"))
    browser.get_log("browser")  # the browser reports the 400
    set_value(browser, "max_tokens", "5")
    # What was not answered has not been said: its text is back in the box, and is told once.
    box = browser.find_element("id", "text")
    assert box.get_property("value") == "Hello"
    say(browser, " again")
    wait_until(lambda: "cut at the most tokens" in browser.find_elements("css selector", ".foot")[-1].text)
    told = served.engine.tokenizer.decode(served.engine.seen[-1]["prompt_ids"])
    assert told == "<|user|>Hello again<|end|>\n<|assistant|>"
    set_value(browser, "max_tokens", "512")


def test_trying_again_tells_the_turn_once(browser: Any, served: Served) -> None:
    open_page(browser, served)
    set_value(browser, "system", "")
    set_value(browser, "max_tokens", "100000")
    say(browser, "Hello")
    wait_until(lambda: "max_tokens: expected at most" in text(browser, ".turn.failed"))
    browser.get_log("browser")
    set_value(browser, "max_tokens", "5")
    browser.find_element("css selector", ".retry").click()
    wait_until(lambda: "cut at the most tokens" in text(browser, ".turn.assistant .foot"))
    assert browser.find_element("id", "text").get_property("value") == ""
    told = served.engine.tokenizer.decode(served.engine.seen[-1]["prompt_ids"])
    assert told == "<|user|>Hello<|end|>\n<|assistant|>"
    say(browser, "And now?")
    wait_until(lambda: len(browser.find_elements("css selector", ".turn.assistant")) == 2)
    wait_until(lambda: not browser.find_elements("css selector", ".live"))
    told = served.engine.tokenizer.decode(served.engine.seen[-1]["prompt_ids"])
    assert told.count("<|user|>") == 2
    assert told.count("<|assistant|>") == 2
    set_value(browser, "max_tokens", "512")


def test_a_phone_in_the_dark(browser: Any, served: Served) -> None:
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    try:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True},
        )
        open_page(browser, served)
        red, green, blue = browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert max(red, green, blue) < 80
        assert not browser.find_element("id", "settings").is_displayed()
        say(browser, "What is a shard?")
        wait_until(
            lambda: (
                not browser.find_elements("css selector", ".live") and text(browser, ".assistant .foot") != ""
            ),
            20,
        )
        widths = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1] == 360
        assert browser.find_element("id", "send").is_displayed()
        browser.find_element("id", "show-settings").click()
        assert browser.find_element("id", "temperature").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
