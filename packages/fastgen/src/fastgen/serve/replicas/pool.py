"""The workers: started together, again when they end, and ended together.

A worker that ends is out at once; it is started again after a pause, which doubles while it keeps ending soon. One that
does not answer any more is ended.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import httpx2

from ...errors import FastgenError
from ...ranks import processes
from .route import Load
from .worker import READY, STOP

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
MOST_PAUSE_S = 60.0
STEADY_S = 60.0  # a worker that lived so long starts again after the first pause
ASK_S, SILENT_S = 5.0, 30.0  # how often each is asked whether it is there, and how long it may take to say so


class WorkerError(FastgenError, RuntimeError):
    """A worker could not start."""


class Status(enum.Enum):
    """STARTING -> READY -> DOWN -> STARTING; STARTING -> DOWN where it cannot start."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"


@dataclass
class Replica:
    """One of them.

    Attributes:
        number: from 0.
        restarts: times that it was started again.
        detail: why it ended last.
        load: what `route` knows of it.
        client: to its socket, while it is ready.
    """

    number: int
    status: Status = Status.STARTING
    restarts: int = 0
    detail: str = ""
    load: Load = field(default_factory=Load)
    client: httpx2.AsyncClient | None = None
    process: BaseProcess | None = None
    connection: Connection | None = None


Launch = Callable[[int, str], tuple[BaseProcess, Connection]]


class Pool:
    """The workers of one server.

    Args:
        launch: starts the worker of a number on a path.
        count: of workers.
        folder: for their sockets.
        ended: is told of each that has ended.
    """

    def __init__(self, launch: Launch, count: int, folder: str, ended: Callable[[Replica], None]) -> None:
        self.replicas = [Replica(number) for number in range(count)]
        self._launch = launch
        self._folder = folder
        self._ended = ended
        self._stopping = False
        self._first: list[asyncio.Future[None]] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> Sequence[Replica]:
        """Those that take requests."""
        return [replica for replica in self.replicas if replica.status is Status.READY]

    async def open(self) -> None:
        """Start all; returns when they are ready.

        Raises:
            WorkerError: one could not start.
        """
        loop = asyncio.get_running_loop()
        self._first = [loop.create_future() for _ in self.replicas]
        self._tasks = [
            asyncio.create_task(self._keep(replica, first))
            for replica, first in zip(self.replicas, self._first, strict=True)
        ]
        await asyncio.gather(*self._first)

    def stop(self) -> None:
        """Have each let those finish whom it serves, and end; asked again: at once."""
        self._stopping = True
        for replica in self.replicas:
            if replica.status is Status.READY and replica.connection is not None:
                try:
                    replica.connection.send_bytes(STOP)
                except OSError:  # it has ended
                    continue
            elif replica.process is not None:
                replica.process.kill()

    async def close(self) -> None:
        """End all, and wait for it."""
        self.stop()
        for first in self._first:
            first.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        alive = [replica.process for replica in self.replicas if replica.process is not None]
        await asyncio.gather(*(asyncio.to_thread(processes.end, process) for process in alive))
        for replica in self.replicas:
            await self._let_go(replica)

    async def _keep(self, replica: Replica, first: asyncio.Future[None]) -> None:
        """Start one again and again."""
        pause_s = FIRST_PAUSE_S
        while True:
            begun_s = time.monotonic()
            await self._live(replica, first)
            if self._stopping:
                return
            if time.monotonic() - begun_s > STEADY_S:
                pause_s = FIRST_PAUSE_S
            logger.error(
                "replica %d has ended (%s); it starts again in %g s", replica.number, replica.detail, pause_s
            )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MOST_PAUSE_S)
            replica.restarts += 1

    async def _live(self, replica: Replica, first: asyncio.Future[None]) -> None:
        """One worker's life."""
        path = f"{self._folder}/{replica.number}-{replica.restarts}"
        replica.status = Status.STARTING
        replica.process, replica.connection = self._launch(replica.number, path)
        process, connection = replica.process, replica.connection
        await _readable(process.sentinel, connection.fileno())
        said = _heard(connection)
        if said == READY:
            replica.client = httpx2.AsyncClient(
                transport=httpx2.AsyncHTTPTransport(uds=path, limits=_UNLIMITED),
                base_url="http://replica",
                timeout=None,
                trust_env=False,
            )
            replica.load = Load()
            replica.status, replica.detail = Status.READY, ""
            if not first.done():
                first.set_result(None)
            listening = asyncio.create_task(_end_if_silent(replica.client, process))
            try:
                await _readable(process.sentinel)
                said = listening.result() if listening.done() else _heard(connection)
            finally:
                listening.cancel()
        elif process.exitcode is None:
            await _readable(process.sentinel)
        replica.status = Status.DOWN
        replica.detail = said.decode(errors="replace") or processes.how_it_ended(process)
        self._ended(replica)
        await self._let_go(replica)
        if not first.done():
            first.set_exception(WorkerError(f"replica {replica.number}: {replica.detail}"))

    async def _let_go(self, replica: Replica) -> None:
        client, connection = replica.client, replica.connection
        replica.client = replica.connection = replica.process = None
        replica.status = Status.DOWN
        if connection is not None:
            connection.close()
        if client is not None:
            await client.aclose()


# uvicorn closes connections that are idle for 5 s: sooner here, or a request may meet one that is being closed.
_UNLIMITED = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)


def _heard(connection: Connection) -> bytes:
    """What a worker has said; nothing if it has ended without a word."""
    try:
        return connection.recv_bytes() if connection.poll() else b""
    except (EOFError, OSError):
        return b""


async def _end_if_silent(client: httpx2.AsyncClient, process: BaseProcess) -> bytes:
    """Kill a worker when it does not answer any more; why."""
    while True:
        await asyncio.sleep(ASK_S)
        try:
            await client.get("/health", timeout=SILENT_S)
        except httpx2.TimeoutException:
            process.kill()
            return f"it did not answer for {SILENT_S:g} s, and was killed".encode()
        except httpx2.HTTPError:
            continue  # it has ended, or is about to: its sentinel says so


async def _readable(*descriptors: int) -> None:
    """Wait until there is something to read at one of them."""
    loop = asyncio.get_running_loop()
    news = asyncio.Event()
    for descriptor in descriptors:
        loop.add_reader(descriptor, news.set)
    try:
        await news.wait()
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)
