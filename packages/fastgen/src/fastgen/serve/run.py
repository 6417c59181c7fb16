"""Sockets and signals: listens, says when it is ready, and stops in order.

On SIGTERM or SIGINT new requests get 503 (and /health says so), those that run may finish within
`Limits.drain_timeout_s`, the rest end with an error; then `Server.run` returns. A second signal does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from ..errors import FastgenError
from .app import create_app
from .interface import Engine
from .limits import ServerConfig
from .service import Service

CLOSE_TIMEOUT_S = 3  # for readers to take the end of their answers, when all generation is over


class ListenError(FastgenError, OSError):
    """The address cannot be listened on."""


class Server:
    """Serves one engine on one address.

    Args:
        engine: nobody else may use it meanwhile.
        config: see `ServerConfig`.
    """

    def __init__(self, engine: Engine, config: ServerConfig | None = None) -> None:
        self.config = config or ServerConfig()
        self._app = create_app(engine, self.config)
        self._stops = 0
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def service(self) -> Service:
        """What stands behind the routes."""
        service: Service = self._app.state.service
        return service

    def run(self, ready: Callable[[str], None]) -> None:
        """Serve until `stop` is called or, in the main thread, a signal comes.

        Args:
            ready: called with the URL when requests are taken.

        Raises:
            ListenError: the address is taken or not this machine's.
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
        server = _Uvicorn(
            uvicorn.Config(
                self._app,
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
        stopping = asyncio.ensure_future(self._drained())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        server.should_exit = True
        await serving

    def _stop(self) -> None:
        self._stops += 1
        self._news.set()

    async def _drained(self) -> None:
        """Wait for a first stop, then until nobody is inside or a second stop."""
        await self._stopped(1)
        drain = asyncio.ensure_future(self.service.drain(self.config.limits.drain_timeout_s))
        hurry = asyncio.ensure_future(self._stopped(2))
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not drain.done():
            drain.cancel()
            await self.service.drain(0.0)
        # Those who were ended late must be told: wait, shortly, until they are.
        await self.service.admission.wait_idle(CLOSE_TIMEOUT_S)

    async def _stopped(self, times: int) -> None:
        while self._stops < times:
            self._news.clear()
            await self._news.wait()


class _Uvicorn(uvicorn.Server):
    """Without uvicorn's own signals: it would close the door before anybody is told why, and raise the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _listening(config: ServerConfig) -> Iterator[socket.socket]:
    """A listening socket; of a family that the host's name has."""
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
            listener.listen(2048)
        except OSError as error:
            raise ListenError(
                f"expected a free port, got {config.port} on {config.host!r}: {error.strerror}; give another port"
            ) from error
        listener.setblocking(False)
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family is socket.AF_INET6 else f"http://{host}:{port}"
