"""A replica's process: a whole server on a Unix socket, stopped in order by the process that started it.

It says `READY`, or why it has ended; each message that it gets is a `stop`, the second one in a hurry.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from ...errors import FastgenError
from ...ranks.places import narrow
from ...ranks.processes import end_with_parent, leave
from ..interface import Engine
from ..limits import ServerConfig
from ..run import Server

READY, STOP = b"ready", b"stop"
logger = logging.getLogger(__name__)


class Loadable(Protocol):
    """An engine that is still to be loaded, such as an `EngineSpec`."""

    def loaded(self) -> AbstractContextManager[Engine]:
        """The engine; let go of at the end."""


@dataclass(frozen=True)
class Work:
    """What a worker is to do.

    Attributes:
        number: of the replica.
        engine: to load.
        config: of its server.
        gpus: first and number of those that it takes; None: the CPU.
    """

    number: int
    engine: Loadable
    config: ServerConfig
    gpus: tuple[int, int] | None


def work(asked: Work, connection: Connection) -> None:
    """A worker's whole life."""
    end_with_parent()
    if asked.gpus is not None:
        narrow(*asked.gpus)
    try:
        with asked.engine.loaded() as engine:
            server = Server(engine, asked.config)
            threading.Thread(target=_obey, args=(server, connection), daemon=True).start()
            server.run(lambda url: connection.send_bytes(READY))
    except Exception as error:
        if not isinstance(error, FastgenError):
            logger.exception("replica %d has failed", asked.number)
        with contextlib.suppress(OSError):
            connection.send_bytes(f"{type(error).__name__}: {error}".encode())
        leave(1)


def _obey(server: Server, connection: Connection) -> None:
    try:
        while connection.recv_bytes() == STOP:
            server.stop()
    except (EOFError, OSError):
        return
