"""Chromium, driven over a pipe by the DevTools protocol: no driver, no port, no other package."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium")

# Chromium reads commands from descriptor 3 and writes to 4.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
FLAGS = """--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --no-first-run
    --disable-dev-shm-usage --disable-background-networking --disable-extensions
    --disable-component-update --hide-scrollbars""".split()
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}


@contextmanager
def chromium(profile):
    """A browser without a window; `profile` is a fresh folder for what it keeps."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    words = [sys.executable, "-c", START, str(theirs_in), str(theirs_out), CHROMIUM]
    with subprocess.Popen(
        [*words, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            browser = Browser(ours_out, ours_in)
            yield browser
            browser.command("Browser.close")
            process.wait(20)
        finally:
            process.kill()
            os.close(ours_out)
            os.close(ours_in)


class Browser:
    def __init__(self, out, into):
        self._out, self._into, self._rest, self._number = out, into, b"", 0
        self.events = []

    def command(self, method, session=None, seconds=20, **params):
        """The result of a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + seconds
        while True:
            answer = self._next(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _next(self, end):
        while b"\0" not in self._rest:
            wait = end - time.monotonic()
            assert select.select([self._into], [], [], max(wait, 0))[0], "the browser is silent"
            chunk = os.read(self._into, 1 << 20)
            assert chunk, "the browser has ended"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, url, width=900, height=700, scheme="light"):
        """A page of its own, with nothing kept from others."""
        context = self.command("Target.createBrowserContext")["browserContextId"]
        target = self.command("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.command("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            page.command(f"{domain}.enable")
        page.command(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        look = [{"name": "prefers-color-scheme", "value": scheme}]
        page.command("Emulation.setEmulatedMedia", features=look)
        page.command("Page.navigate", url=url)
        page.until("document.readyState === 'complete' && location.protocol === 'http:'")
        return page


class Page:
    def __init__(self, browser, session):
        self._browser, self._session = browser, session

    def command(self, method, **params):
        return self._browser.command(method, self._session, **params)

    def value(self, script):
        """What a JavaScript expression gives."""
        found = self.command("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script, seconds=15):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, (script, self.value("document.body.innerText"))
            time.sleep(0.02)

    def type(self, text):
        self.command("Input.insertText", text=text)

    def press(self, key, modifiers=0):
        """A key, as a person presses it; modifiers 1 is Alt, 2 Control, 8 Shift."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.command("Input.dispatchKeyEvent", type="keyDown", modifiers=modifiers, **code, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **code)

    def click(self, selector):
        """A press of the mouse on the middle of an element."""
        x, y = self.value(
            f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.command(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )

    def complaints(self):
        """Errors of scripts, and what the browser refused to load or run."""
        self.value("1")  # so that all events before it are read
        found = []
        for event in self._browser.events:
            if event.get("sessionId") == self._session:
                if event["method"] == "Runtime.exceptionThrown":
                    found.append(event["params"]["exceptionDetails"])
                if event["method"] == "Log.entryAdded":
                    entry = event["params"]["entry"]
                    found += [entry["text"]] if entry["level"] == "error" else []
        return found

    def picture(self, path):
        data = self.command("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
