"""A page in a real, headless Chromium, driven through its DevTools pipe: no package and no port is needed."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
NO_CHROMIUM = "needs a browser: apt-get install chromium"
_ANSWER_TIMEOUT_S = 60.0
_KEYS = {"Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "End": 35, "Home": 36, "Escape": 27}


class Page:
    """One tab. ``problems``: what its console complained about, and every address that it asked a network for."""

    def __init__(self, file: Path, profile: Path, width: int = 1400, height: int = 1000) -> None:
        self.problems: list[str] = []
        self._ids = itertools.count(1)
        self._buffer = b""
        ours_to_write, theirs_to_read, theirs_to_write, ours_to_read = *reversed(os.pipe()), *reversed(os.pipe())
        self._write, self._read = ours_to_write, ours_to_read

        def place_pipes() -> None:  # Chromium reads from 3 and writes to 4
            high = [os.dup(theirs_to_read), os.dup(theirs_to_write)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        quiet = ["--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-sync"]
        self._process = subprocess.Popen(
            [str(CHROMIUM), *options, *quiet, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
            preexec_fn=place_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_to_read)
        os.close(theirs_to_write)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.wait_for("document.documentElement?.dataset?.ready === 'true'")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self.call("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol; returns its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next_message()).get("id") != number:
            self._notice(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until it is true."""
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, (expression, self.problems)
            time.sleep(0.02)

    def point(self, selector: str, right: float = 0.5, click: bool = False) -> None:
        """Move the pointer over an element, so far from its left edge, and click."""
        where = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{where}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.evaluate(f"{where}.getBoundingClientRect().toJSON()")
        at = {"x": box["left"] + right * box["width"], "y": box["top"] + box["height"] / 2}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def press(self, key: str) -> None:
        """A key, for whatever has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def choose(self, selector: str, value: str) -> None:
        """An option of a list, or a place of a slider."""
        where = f"document.querySelector({json.dumps(selector)})"
        change = (
            f"e.value = {json.dumps(value)}; e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'))"
        )
        self.evaluate(f"(() => {{ const e = {where}; {change} }})()")

    def screenshot(self, file: Path) -> bytes:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        image = base64.b64decode(shot["data"])
        file.write_bytes(image)
        return image

    def _next_message(self) -> dict[str, Any]:
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _notice(self, event: dict[str, Any]) -> None:
        name, parameters = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(parameters["args"]))
        elif name == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"])
        elif name == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith(("file:", "data:")):
            self.problems.append(f"asked the network for {parameters['request']['url']}")
