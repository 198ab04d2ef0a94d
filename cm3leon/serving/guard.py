"""An ASGI wrapper of the application: it limits bodies, checks the host name, adds security headers and counts requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cm3leon.serving.errors import ApiError
from cm3leon.serving.metrics import Metrics

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"content-security-policy", POLICY.encode()),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
RETRY_SECONDS = 5
"""When a client whose body found no room is to try again."""


class Guard:
    """An ASGI application that wraps another.

    Args:
        tasks: path -> task, of the requests that are counted.
        max_body: largest body, bytes.
        max_held: bytes of the bodies of all requests that are not answered yet.
        hosts: host names that requests may address, against DNS rebinding: a page of another site whose name resolves to this address
            gets nothing. None: any.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, tasks: Mapping[str, str], max_body: int, max_held: int, hosts: Collection[str] | None = None
    ) -> None:
        self.app, self.metrics, self.tasks, self.hosts = app, metrics, tasks, hosts
        self.max_body, self.max_held = max_body, max_held
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
                if scope["path"] in self.tasks:
                    self.metrics.requests.labels(self.tasks[scope["path"]], message["status"]).inc()
            await send(message)

        with self._holding() as hold:
            try:
                self.check_host(Headers(scope=scope).get("host", ""))
                body = await self.read_body(Headers(scope=scope), receive, hold)
            except ApiError as error:
                await error.response()(scope, receive, send_on)
                return
            if body is None:  # the client has gone: nobody to answer
                return
            # The application reads the body that was read here as one message; what follows comes from the connection.
            unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
            del body  # the application keeps a copy

            async def receive_on() -> Message:
                return unread.pop() if unread else await receive()

            await self.app(scope, receive_on, send_on)

    @contextmanager
    def _holding(self) -> Iterator[Callable[[int], None]]:
        """A function that counts bytes of a request's body as held until the block ends; 429 if there is no room for them."""
        own = 0

        def hold(size: int) -> None:
            nonlocal own
            if size and self._held + size > self.max_held:
                message = f"the bodies of waiting requests take the {self.max_held} bytes there are; try again in {RETRY_SECONDS} s"
                raise ApiError(429, message, code="queue_full", retry_after=RETRY_SECONDS)
            own += size
            self._held += size

        try:
            yield hold
        finally:
            self._held -= own

    def check_host(self, host: str) -> None:
        """Raises :class:`ApiError` for another host name."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name.strip("[]").lower() not in self.hosts:
            raise ApiError(421, f"this server is not {name or 'without a name'}; ask for {' or '.join(self.hosts)}", code="host")

    async def read_body(self, headers: Headers, receive: Receive, hold: Callable[[int], None]) -> bytes | None:
        """The body, or None if the client disconnected.

        Args:
            hold: is told of the bytes received.

        Raises:
            ApiError: 413 as soon as more than ``max_body`` bytes are announced or received, 429 if ``hold`` has no room for them.
        """
        too_large = ApiError(413, f"the body is larger than {self.max_body} bytes; send smaller images", code="body_too_large")
        announced = headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > self.max_body:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            received = message.get("body", b"")
            if len(body) + len(received) > self.max_body:
                raise too_large
            hold(len(received))
            body += received
            if not message.get("more_body", False):
                return bytes(body)
