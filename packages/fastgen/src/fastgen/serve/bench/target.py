"""What a benchmark asks: a server over HTTP, or an engine in this process.

The HTTP client is a few lines on asyncio's streams: a request, its status, its events. A client with comforts would
measure itself on a small machine.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import uuid
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from ...errors import ConfigError, FastgenError
from ...request import SamplingParams
from ..interface import Job
from ..loop import EngineLoop


class TargetError(FastgenError, RuntimeError):
    """The server did not answer as it should."""


class HttpTarget:
    """An OpenAI-compatible server.

    Args:
        url: such as http://127.0.0.1:8000, with or without /v1.
        model: its name there; None: the only one.
        api_key: if the server asks for one.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ConfigError(f"expected a URL such as http://127.0.0.1:8000, got {url!r}")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self._headers = [f"Host: {parts.netloc}", "Content-Type: application/json", "Connection: close"]
        if api_key:
            self._headers.append(f"Authorization: Bearer {api_key}")
        self._model = model

    async def generate(self, prompt_ids: list[int], max_tokens: int) -> AsyncIterator[int]:
        """Generate exactly `max_tokens`; yields how many came, as they come."""
        body = {
            "prompt": prompt_ids,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self._model is not None:
            body["model"] = self._model
        num_tokens = 0
        async for event in self._events(json.dumps(body).encode()):
            if event.get("error"):
                raise TargetError(str(event["error"].get("message")))
            if event.get("choices"):
                # A server that does not count in each event sends a token an event.
                usage = event.get("usage") or {}
                total = usage.get("completion_tokens", num_tokens + 1)
                if total > num_tokens:
                    yield total - num_tokens
                num_tokens = total

    async def _events(self, body: bytes) -> AsyncIterator[dict[str, Any]]:
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=2**20)
        try:
            head = [f"POST {self._path} HTTP/1.1", *self._headers, f"Content-Length: {len(body)}", "", ""]
            writer.write("\r\n".join(head).encode() + body)
            await writer.drain()
            status = (await reader.readline()).decode("latin-1").split()
            headers = await reader.readuntil(b"\r\n\r\n")
            if len(status) < 2 or status[1] != "200":
                text = (await reader.read(10_000)).decode(errors="replace")
                raise TargetError(f"expected 200, got {' '.join(status) or 'nothing'}: {text}")
            chunked = b"transfer-encoding: chunked" in headers.lower()
            async for line in _lines(_chunks(reader) if chunked else _plain(reader)):
                if line == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        except asyncio.IncompleteReadError as error:
            raise TargetError("the server closed the connection within an answer") from error
        finally:
            writer.close()


async def _plain(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(65536):
        yield part


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Bodies of HTTP/1.1 chunks."""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")


class EngineTarget:
    """An engine in this process, without HTTP. Its loop must run."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    async def generate(self, prompt_ids: list[int], max_tokens: int) -> AsyncIterator[int]:
        """Generate exactly `max_tokens`; yields how many came, as they come."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        stream = await self._loop.open(uuid.uuid4().hex, [Job(prompt_ids, params)])
        try:
            while pieces := await stream.read():
                num_tokens = sum(len(piece.output.new_token_ids) for piece in pieces)
                if num_tokens:
                    yield num_tokens
        finally:
            stream.close()
