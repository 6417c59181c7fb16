"""A server for tests, and a client that can also misbehave: it sends what it is told, byte for byte."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fake_engine import FakeEngine
from fastgen.engine import Engine
from fastgen.serve import Limits, Server, ServerConfig


@dataclass
class Reply:
    """One answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """Of a stream that ended as it should."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@dataclass
class Served:
    """A running server and its engine."""

    url: str
    server: Server
    engine: FakeEngine

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = 20,
    ) -> Reply:
        """One request on a connection of its own; `body` may be raw bytes."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(*self.address, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request(method, path, raw, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers=headers)

    def complete(self, **body: Any) -> Reply:
        return self.ask("POST", "/v1/completions", {"prompt": "Hello", **body})

    def chat(self, **body: Any) -> Reply:
        messages = [{"role": "user", "content": "Hello"}]
        return self.ask("POST", "/v1/chat/completions", {"messages": messages, **body})

    def send(self, path: str, body: object) -> socket.socket:
        """Send a request and leave its answer unread."""
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(self.address)
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return connection

    def metric(self, name: str, **headers: str) -> float:
        """A number of /metrics, by the name and labels that are written there."""
        for line in self.get("/metrics", **headers).body.decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def is_idle(self) -> bool:
        """Nothing is left of any request, on either side of the loop."""
        service = self.server.service
        inside = service.loop.num_open or service.admission.num_inside
        return not (inside or self.engine.has_work or getattr(self.engine, "requests", None))


@contextlib.contextmanager
def serving(engine: FakeEngine | Engine | None = None, **config: Any) -> Iterator[Served]:
    """A server on a free port; fields of `Limits` may be given beside those of `ServerConfig`."""
    limits = {name: config.pop(name) for name in list(config) if name in Limits.__dataclass_fields__}
    engine = engine or FakeEngine()
    server = Server(engine, ServerConfig(port=0, limits=Limits(**limits), **config))
    with server.background() as url:
        yield Served(url, server, engine)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Fail if `condition` does not hold within `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never held"
        time.sleep(0.005)
