"""A process that repeats what rank 0 does with its engine, so that both have the same forwards at the same time.

In: messages of `calls`. Out: what it says of itself: `HERE`, `READY`, or why it gives up. It ends when the connection
does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from ..errors import FastgenError, RankError
from .calls import Call, Digest, Step, unpacked
from .places import Place, share_cores
from .processes import end_with_parent, leave

if TYPE_CHECKING:
    from ..config import EngineConfig
    from ..engine import Engine

HERE, READY = b"here", b"ready"
logger = logging.getLogger(__name__)


def follow(place: Place, model: str, config: EngineConfig, connection: Connection) -> None:
    """A follower's whole life.

    Args:
        place: among the ranks.
        model: a local Hugging Face directory.
        config: this rank's.
        connection: to rank 0.
    """
    end_with_parent()
    try:
        connection.send_bytes(HERE)
        engine = _engine(place, model, config)
        connection.send_bytes(READY)
        obey(engine, connection.recv_bytes)
    except (EOFError, BrokenPipeError):  # rank 0 needs no followers any more
        return
    except Exception as error:
        if not isinstance(error, FastgenError):
            logger.exception("rank %d has failed", place.rank)
        with contextlib.suppress(OSError):  # rank 0 may have failed with the same error, and be gone
            connection.send_bytes(f"{type(error).__name__}: {error}".encode())
        leave(1)


def _engine(place: Place, model: str, config: EngineConfig) -> Engine:
    from ..llm import build_engine

    assert config.device is not None
    if config.device.type == "cpu":
        share_cores(place.processes)
    return build_engine(model, config, group=place.join(config.device))


def obey(engine: Engine, receive: Callable[[], bytes]) -> None:
    """Repeat every call of every message, until `receive` raises.

    Raises:
        RankError: this engine has not said what rank 0's has said.
    """
    digest = Digest()
    while True:
        calls, expected = unpacked(receive())
        if digest.value != expected:
            raise RankError(
                f"expected the same tokens and errors as rank 0 (digest {expected:08x}), got {digest.value:08x}"
            )
        for call in calls:
            _repeat(engine, call, digest)


def _repeat(engine: Engine, call: Call, digest: Digest) -> None:
    if isinstance(call, Step):
        digest.outputs(call.make(engine))
        return
    try:
        call.make(engine)
    except Exception as error:  # rank 0 tells whoever asked
        digest.refused(error)
