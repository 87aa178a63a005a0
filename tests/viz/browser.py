"""A headless Chromium that is driven over two pipes: it needs no driver, no port and no download.

The commands are those of the DevTools protocol. What a page did is kept: what it wrote to its console, the exceptions that it
left, and the addresses that it asked for.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

#: Nothing is asked of the network, whatever a page says; and nothing of the browser's own is shown or updated.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-extensions", "--no-first-run", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip

#: The protocol's pipes are the descriptors 3 and 4: a few lines that put them there and become the browser.
_AS_3_AND_4 = (
    "import os, sys; pipes = [os.dup(int(number)) for number in sys.argv[1:3]]; spare = [os.dup(0) for _ in range(5)]; "
    "pipes = [os.dup(pipe) for pipe in pipes]; [os.dup2(pipe, place) for pipe, place in zip(pipes, (3, 4))]; "
    "os.execv(sys.argv[3], sys.argv[3:])"
)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: install your system's package (Debian: chromium) to run this test"
)

#: When nothing on the page has changed for half a second: circuitsvis' framework draws many widgets one after the other.
_SETTLED = """new Promise(done => {
  let timer = setTimeout(done, 500);
  const again = () => { clearTimeout(timer); timer = setTimeout(done, 500); };
  new MutationObserver(again).observe(document, { subtree: true, childList: true, attributes: true });
})"""

#: Seconds that an answer may take on a busy machine.
PATIENCE = 60.0


class Browser:
    """One browser. Close it, or use it in a ``with`` statement."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        command = [CHROMIUM, *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", _AS_3_AND_4, str(reads), str(writes), *command],
            pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        self._ids = itertools.count(1)
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.ask("Browser.close")
        finally:
            os.close(self._to)
            os.close(self._from)
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def open(self, file: Path, *, width: int = 1300, height: int = 900) -> Page:
        """A file in a tab of its own, when it has loaded and its scripts have run."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        page.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        page.ask("Page.navigate", url=file.as_uri())
        self._read_until(
            lambda message: message.get("method") == "Page.loadEventFired" and message["sessionId"] == session
        )
        page.run(_SETTLED)
        return page

    def ask(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A command's answer."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        left = json.dumps(message).encode() + b"\0"
        while left:
            left = left[os.write(self._to, left) :]
        answer = self._read_until(lambda message: message.get("id") == number)
        assert "error" not in answer, (method, answer["error"])
        return dict(answer["result"])

    def _read_until(self, wanted: Any) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while True:
            while b"\0" in self._rest:
                first, _, self._rest = self._rest.partition(b"\0")
                message: dict[str, Any] = json.loads(first)
                if "method" in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser gave no answer in {PATIENCE:g} s"
            chunk = os.read(self._from, 2**16)
            assert chunk, "the browser has gone"
            self._rest += chunk


class Page:
    """A page in a tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.ask(method, session=self._session, **parameters)

    def run(self, javascript: str) -> Any:
        """The value of an expression, in plain JSON types; a promise is waited for."""
        answer = self.ask("Runtime.evaluate", expression=javascript, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Console messages of any level, log entries, uncaught exceptions, and dialogs."""
        names = (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        )
        return [json.dumps(event["params"])[:600] for event in self._events() if event["method"] in names]

    def requests(self) -> list[str]:
        """The addresses that were asked for, but for the page itself and what it carries."""
        asked = [event["params"] for event in self._events() if event["method"] == "Network.requestWillBeSent"]
        return [
            each["request"]["url"]
            for each in asked
            if each.get("type") != "Document" and not each["request"]["url"].startswith("data:")
        ]

    def screenshot(self, path: Path) -> None:
        """The whole page, from top to bottom."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16000), "scale": 1}
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self._browser.ask("Target.closeTarget", targetId=self._target)

    def _events(self) -> list[dict[str, Any]]:
        return [event for event in self._browser.events if event.get("sessionId") == self._session]
