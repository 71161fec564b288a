"""Chromium for tests: the WebDriver protocol in plain HTTP, and one page dump without a driver."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # key of an element, fixed by the standard
KEYS = {"Escape": "\ue00c", "Tab": "\ue004", "Enter": "\ue007", "Right": "\ue014", "Down": "\ue015"}


def need(name: str) -> str:
    """The path of a program, or a skipped test."""
    return shutil.which(name) or pytest.skip(f"needs {name}")


class Browser:
    """One window of chromium."""

    def __init__(self, address: str) -> None:
        self.address = address
        arguments = {"binary": need("chromium"), "args": FLAGS}
        wanted = {"goog:chromeOptions": arguments, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.address += f"/session/{session['sessionId']}"
        self.look()

    def __call__(self, method: str, path: str, body: object = None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as refused:  # its body says why
            raise AssertionError(json.load(refused)["value"]["message"]) from None

    def open(self, page: Path, fragment: str = "") -> None:
        self("POST", "/url", {"url": "about:blank"})
        self("POST", "/url", {"url": page.resolve().as_uri() + fragment})

    def js(self, script: str):
        return self("POST", "/execute/sync", {"script": script, "args": []})

    def becomes(self, script: str, wanted: object, seconds: float = 5.0) -> bool:
        """Whether the script's value gets there in time; browsers answer events when they like."""
        end = time.monotonic() + seconds
        while (value := self.js(script)) != wanted:
            if time.monotonic() > end:
                raise AssertionError(f"{script}: {value!r}, not {wanted!r}")
            time.sleep(0.02)
        return True

    def click(self, selector: str) -> None:
        found = self("POST", "/element", {"using": "css selector", "value": selector})
        self("POST", f"/element/{found[ELEMENT]}/click", {})

    def press(self, key: str) -> None:
        strokes = [{"type": kind, "value": KEYS[key]} for kind in ("keyDown", "keyUp")]
        self("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": strokes}]})

    def look(self, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}  # nothing moves under a click
        self._cdp("Emulation.setDeviceMetricsOverride", size)
        self._cdp("Emulation.setEmulatedMedia", {"features": [scheme, still]})

    def complaints(self) -> list[str]:
        """What the console has said since the last question: errors, blocked resources."""
        return [entry["message"] for entry in self("POST", "/se/log", {"type": "browser"})]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("GET", "/screenshot")))

    def _cdp(self, command: str, parameters: dict) -> None:
        self("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser for the length of the block."""
    driver = subprocess.Popen(
        [need("chromedriver"), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        lines = (line.decode() for line in driver.stdout)
        found = (re.search(r"successfully on port (\d+)", line) for line in lines)
        port = next(match[1] for match in found if match)
        window = Browser(f"http://127.0.0.1:{port}")
        yield window
        window("DELETE", "")
    finally:
        driver.terminate()
        driver.stdout.close()
        driver.wait(20)


def dump(page: Path, fragment: str, profile: Path) -> str:
    """The page's DOM after its scripts have run."""
    address = page.resolve().as_uri() + fragment
    flags = [f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [need("chromium"), *FLAGS, *flags, address], capture_output=True, timeout=60, check=True
    )
    return done.stdout.decode()
