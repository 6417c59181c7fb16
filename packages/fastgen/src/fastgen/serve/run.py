"""Sockets and signals: listens, says when it is ready, and stops in order.

On SIGTERM or SIGINT new requests get 503 (and /health says so), those that run may finish within
`Limits.drain_timeout_s`, the rest end with an error; then `HttpServer.run` returns. A second signal does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp

from ..errors import FastgenError
from .app import create_app
from .heads import patient
from .interface import Engine
from .limits import ServerConfig
from .service import Service

CLOSE_TIMEOUT_S = 3  # for readers to take the end of their answers, when all generation is over


class ListenError(FastgenError, OSError):
    """The address cannot be listened on."""


class House(Protocol):
    """What stands behind an application: whom a server asks before it opens and closes the door."""

    async def open(self) -> None:
        """Get ready, before requests are taken; may be cancelled."""

    async def drain(self, timeout_s: float) -> bool:
        """Let nobody in, wait for those inside, then end what is left; whether nothing was."""

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False if somebody still is after `timeout_s`."""

    async def wait_failed(self) -> Exception:
        """Wait until nothing can be served any more; gives the reason."""

    async def close(self) -> None:
        """Let go of everything; also where `open` was cancelled."""


class HttpServer:
    """Serves an application on one address.

    Args:
        app: with a lifespan.
        house: that stands behind it.
        config: see `ServerConfig`.
    """

    def __init__(self, app: ASGIApp, house: House, config: ServerConfig) -> None:
        self.config = config
        self._app = app
        self._house = house
        self._stops = 0
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, ready: Callable[[str], None]) -> None:
        """Serve until `stop` is called or, in the main thread, a signal comes.

        Args:
            ready: called with the URL when requests are taken.

        Raises:
            ListenError: the address is taken or not this machine's.
            FastgenError: it could not open; or nothing can be served any more, and `config.end_on_failure` is set.
        """
        with _listening(self.config) as listener:
            asyncio.run(self._run(listener, ready))

    def stop(self) -> None:
        """Stop in order; called a second time: at once. May be called in any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has stopped already
                self._loop.call_soon_threadsafe(self._stop)

    @contextlib.contextmanager
    def background(self) -> Iterator[str]:
        """Serve in a thread; gives the URL, and stops in order at the end."""
        urls: list[str] = []
        raised: list[BaseException] = []
        settled = threading.Event()

        def ready(url: str) -> None:
            urls.append(url)
            settled.set()

        def work() -> None:
            try:
                self.run(ready)
            except BaseException as error:
                raised.append(error)
            finally:
                settled.set()

        thread = threading.Thread(target=work, name="fastgen-server")
        thread.start()
        settled.wait()
        try:
            if urls:
                yield urls[0]
        finally:
            self.stop()
            thread.join()
        if raised:
            raise raised[0]

    async def _run(self, listener: socket.socket, ready: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._stop)
        try:
            if await self._opened():
                await self._serve(listener, ready)
        finally:
            await self._house.close()

    async def _opened(self) -> bool:
        """Whether the house is open; not if this server is stopped before."""
        opening = asyncio.ensure_future(self._house.open())
        stopping = asyncio.ensure_future(self._stopped(1))
        await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if opening.done():
            opening.result()
            return True
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        return False

    async def _serve(self, listener: socket.socket, ready: Callable[[str], None]) -> None:
        server = _Uvicorn(
            uvicorn.Config(
                self._app,
                http=patient(self.config.limits.read_timeout_s),
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            )
        )
        serving = asyncio.ensure_future(server.serve([listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if not serving.done():
            ready(_url(listener))
        ends: set[asyncio.Future[Any]] = {serving, asyncio.ensure_future(self._drained())}
        failing = asyncio.ensure_future(self._house.wait_failed())
        if self.config.end_on_failure:
            ends.add(failing)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            await self._house.wait_idle(CLOSE_TIMEOUT_S)  # for those who were inside to be told
        for each in {failing, *ends} - {serving}:
            each.cancel()
        server.should_exit = True
        await serving
        if self.config.end_on_failure and failing.done() and not failing.cancelled():
            raise failing.result()

    def _stop(self) -> None:
        self._stops += 1
        self._news.set()

    async def _drained(self) -> None:
        """Wait for a first stop, then until nobody is inside or a second stop."""
        await self._stopped(1)
        drain = asyncio.ensure_future(self._house.drain(self.config.limits.drain_timeout_s))
        hurry = asyncio.ensure_future(self._stopped(2))
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not drain.done():
            drain.cancel()
            await self._house.drain(0.0)
        # Those who were ended late must be told: wait, shortly, until they are.
        await self._house.wait_idle(CLOSE_TIMEOUT_S)

    async def _stopped(self, times: int) -> None:
        while self._stops < times:
            self._news.clear()
            await self._news.wait()


class Server(HttpServer):
    """Serves one engine on one address.

    Args:
        engine: nobody else may use it meanwhile.
        config: see `ServerConfig`.

    Attributes:
        service: what stands behind the routes.
    """

    def __init__(self, engine: Engine, config: ServerConfig | None = None) -> None:
        config = config or ServerConfig()
        app = create_app(engine, config)
        self.service: Service = app.state.service
        super().__init__(app, self.service, config)


class _Uvicorn(uvicorn.Server):
    """Without uvicorn's own signals: it would close the door before anybody is told why, and raise the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _listening(config: ServerConfig) -> Iterator[socket.socket]:
    """A listening socket; of a family that the host's name has."""
    with _on_path(config.socket_path) if config.socket_path else _on_address(config) as listener:
        listener.listen(2048)
        listener.setblocking(False)
        yield listener


@contextlib.contextmanager
def _on_path(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(path)
        except OSError as error:
            raise ListenError(
                f"expected a path for a socket where nothing is yet, got {path!r}: {error.strerror or error}"
            ) from error
        try:
            yield listener
        finally:
            Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def _on_address(config: ServerConfig) -> Iterator[socket.socket]:
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(f"expected an address of this machine, got {config.host!r}: {error}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Connections inherit it: the kernel ends one whose reader takes nothing, whatever is buffered for it.
            timeout_ms = int(1000 * config.limits.write_timeout_s)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        try:
            listener.bind(address)
        except OSError as error:
            raise ListenError(
                f"expected a free port, got {config.port} on {config.host!r}: {error.strerror}; give another port"
            ) from error
        yield listener


def _url(listener: socket.socket) -> str:
    if listener.family is socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family is socket.AF_INET6 else f"http://{host}:{port}"
