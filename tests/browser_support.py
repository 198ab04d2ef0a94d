"""A headless Chromium for tests, driven over its DevTools protocol."""

import base64
import json
import subprocess
import time
import urllib.request

from websockets.sync.client import connect


class Browser:
    """A page of a headless browser, driven over its DevTools protocol."""

    def __init__(self, program, profile):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
        options += [f"--user-data-dir={profile}", "--window-size=1200,900", "--no-first-run", "--disable-extensions", "about:blank"]
        self.process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file, end = profile / "DevToolsActivePort", time.monotonic() + 30
        while not (port_file.is_file() and port_file.read_text().strip()):
            assert time.monotonic() < end and self.process.poll() is None, "the browser did not start"
            time.sleep(0.02)
        with urllib.request.urlopen(f"http://127.0.0.1:{port_file.read_text().split()[0]}/json/list") as answer:
            [address] = [target["webSocketDebuggerUrl"] for target in json.load(answer) if target["type"] == "page"]
        self.socket = connect(address, max_size=None, proxy=None)
        self.number, self.complaints, self.failed_requests, self.pending_requests = 0, [], [], set()
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """The result of a command."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=20))
            self._note(message.get("method"), message.get("params"))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def _note(self, event, params):
        """Keep what the page complains of: a script that fails, something the policy blocks.

        Requests that failed are kept apart: an error that the server answers is no fault of the page.
        """
        if event == "Log.entryAdded":
            entry = params["entry"]
            kept = self.failed_requests if entry["source"] == "network" else self.complaints
            kept.append(f"{entry['text']} {entry.get('url', '')}".strip())
        elif event == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.complaints.append(" ".join(str(part.get("value", part.get("description"))) for part in params["args"]))
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event == "Network.requestWillBeSent" and params["type"] in ("Document", "XHR", "Fetch", "Image"):
            self.pending_requests.add(params["requestId"])
        elif event in ("Network.loadingFinished", "Network.loadingFailed"):
            self.pending_requests.discard(params["requestId"])

    def evaluate(self, script):
        """The value of a script in the page."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script, seconds=15):
        """Wait until a script in the page is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"!!({script})"):
            assert time.monotonic() < end, f"{script} did not come about; the page says {self.evaluate('document.body.innerText')}"
            time.sleep(0.02)

    def visit(self, url, ready="true", seconds=15):
        """Show a page and wait until it is loaded and a script in it is true."""
        self.send("Page.navigate", url="about:blank")  # an address that differs after the # alone would not be loaded
        self.until("document.URL === 'about:blank'")
        self.pending_requests.clear()
        self.send("Page.navigate", url=url)
        self.until(f"document.URL !== 'about:blank' && document.readyState === 'complete' && ({ready})", seconds)

    def open(self, url):
        """Show the page of a served model and wait until it knows the model."""
        self.visit(url, "document.querySelector('#model').textContent.includes('generates')")

    def until_quiet(self, seconds=2.0, limit=120.0):
        """Wait until the page has stayed as it is for some seconds, with no request and no endless animation; not longer than the limit."""
        endless = "document.getAnimations().filter((found) => found.effect.getComputedTiming().iterations === Infinity).length"
        shown, since, end = None, time.monotonic(), time.monotonic() + limit
        while time.monotonic() < min(since + seconds, end):
            now = self.evaluate("document.documentElement.outerHTML.length")
            if now != shown or self.pending_requests or self.evaluate(endless):  # such as a spinner
                shown, since = now, time.monotonic()
            time.sleep(0.1)

    def resize(self, width, height):
        """Give the page another size, pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def middle(self, selector, across=0.5, down=0.5):
        """Where a place of an element is on the screen."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        frame = self.evaluate(
            f"(({{x, y, width, height}}) => [x, y, width, height])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        assert frame[2] and frame[3], f"{selector} is not to be seen"
        return frame[0] + across * frame[2], frame[1] + down * frame[3]

    def mouse(self, kind, place):
        self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", buttons=1, clickCount=1)

    def click(self, selector):
        place = self.middle(selector)
        self.mouse("mousePressed", place)
        self.mouse("mouseReleased", place)

    def drag(self, selector, start, end):
        places = self.middle(selector, *start), self.middle(selector, *end)
        self.mouse("mousePressed", places[0])
        self.mouse("mouseMoved", places[1])
        self.mouse("mouseReleased", places[1])

    def write(self, selector, text):
        self.click(selector)
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)

    def upload(self, selector, file):
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def press(self, key):
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def text(self, selector):
        """What a person reads there."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def count(self, selector):
        return self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")

    def keep_downloads(self, directory):
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(directory))

    def screenshot(self, file):
        """Write what is to be seen as a PNG."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(10)
