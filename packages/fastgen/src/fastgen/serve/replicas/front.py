"""What stands behind the routes of `app`: chooses a replica for each request, and asks all for what concerns all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx2
from starlette.requests import Request
from starlette.responses import Response

from ..admission import Admission
from ..answer_schemas import Health, ReplicaHealth, ServerStats
from ..errors import overloaded
from ..limits import ServerConfig
from ..run import CLOSE_TIMEOUT_S
from ..sse import while_connected
from .forward import Forwarded, gone, sent
from .pool import Launch, Pool, Replica
from .route import beginnings, choose
from .totals import Totals

_ASK_TIMEOUT_S = 5.0  # for a replica to say its numbers; one that does not is left out


class Front:
    """Answers requests with several replicas: the `House` of a server.

    Args:
        launch: see `Pool`.
        count: of replicas.
        folder: for their sockets.
        config: see `ServerConfig`.
    """

    def __init__(self, launch: Launch, count: int, folder: str, config: ServerConfig) -> None:
        self.config = config
        self.totals = Totals(lambda: self.pool.replicas)
        self.pool = Pool(launch, count, folder, lambda replica: self.totals.ended(replica.number))
        self.admission = Admission(config.limits.concurrent)
        self._num_chosen = 0

    # -- requests -------------------------------------------------------------------------------------------

    async def generate(self, http: Request) -> Response:
        """A request that keeps a replica busy."""
        body = await http.body()
        with ExitStack() as stack:
            stack.enter_context(self.admission.slot())
            return await self._forward(http, body, stack)

    async def look(self, http: Request) -> Response:
        """One that any replica answers at once."""
        with ExitStack() as stack:
            return await self._forward(http, b"", stack)

    async def _forward(self, http: Request, body: bytes, stack: ExitStack) -> Response:
        pieces = beginnings(body)
        tried: set[int] = set()
        while True:
            replica = self._choose(pieces, tried)
            client = replica.client
            assert client is not None
            with ExitStack() as own:
                own.enter_context(_running(replica))
                try:
                    answer = await while_connected(http.receive, sent(client, http, body))
                except httpx2.ConnectError:  # it ended and took nothing of this: another one may
                    tried.add(replica.number)
                    continue
                except httpx2.HTTPError as error:
                    raise gone() from error
                replica.load.learn(pieces)
                stack.push(own.pop_all())
            return Forwarded(answer, self.config.limits.write_timeout_s, stack.pop_all().close)

    def _choose(self, pieces: list[int], tried: set[int]) -> Replica:
        ready = {replica.number: replica for replica in self.pool.ready if replica.number not in tried}
        if not ready:
            raise overloaded(
                "no replica is there now; one is being started", code="no_replica", retry_after_s=5
            )
        chosen = ready[choose({number: replica.load for number, replica in ready.items()}, pieces)]
        self._num_chosen += 1
        chosen.load.last = self._num_chosen
        return chosen

    # -- all of them ----------------------------------------------------------------------------------------

    def health(self) -> Health:
        """`GET /health`."""
        replicas = [
            ReplicaHealth(
                replica=each.number,
                status=each.status.value,
                requests=each.load.running,
                restarts=each.restarts,
                detail=each.detail or None,
            )
            for each in self.pool.replicas
        ]
        if self.admission.stopping:
            return Health(status="stopping", replicas=replicas)
        if not self.pool.ready:
            return Health(status="failed", detail="no replica is there now", replicas=replicas)
        return Health(status="ok", replicas=replicas)

    async def stats(self) -> ServerStats:
        """`GET /stats`."""
        parts = [ServerStats.model_validate_json(text) for text in (await self._ask("/stats")).values()]
        names = [name for name in ServerStats.model_fields if name != "requests"]
        sums = {name: sum(getattr(part, name) for part in parts) for name in names}
        return ServerStats(requests=self.admission.num_inside, **sums)

    async def metrics(self) -> bytes:
        """`GET /metrics`."""
        return self.totals.exposition(await self._ask("/metrics"))

    async def _ask(self, path: str) -> dict[int, str]:
        """What each replica answers."""

        async def ask(replica: Replica) -> tuple[int, str] | None:
            assert replica.client is not None
            try:
                answer = await replica.client.get(path, timeout=_ASK_TIMEOUT_S)
            except httpx2.HTTPError:
                return None
            return replica.number, answer.text

        answers = await asyncio.gather(*map(ask, self.pool.ready))
        return dict(each for each in answers if each is not None)

    # -- opening and closing --------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start the replicas."""
        await self.pool.open()

    async def drain(self, timeout_s: float) -> bool:
        """Let nobody in, and have the replicas stop in order; whether nothing had to be ended."""
        self.admission.stop()
        self.pool.stop()
        # Each replica gives those whom it serves as long, and tells the rest.
        await self.admission.wait_idle(timeout_s + CLOSE_TIMEOUT_S)
        return not self.admission.num_inside

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False if somebody still is after `timeout_s`."""
        return await self.admission.wait_idle(timeout_s)

    async def wait_failed(self) -> Exception:
        """Never: replicas that end are started again."""
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def close(self) -> None:
        """End the replicas."""
        await self.pool.close()


@contextmanager
def _running(replica: Replica) -> Iterator[None]:
    """Around a request that it answers."""
    load = replica.load
    load.running += 1
    try:
        yield
    finally:
        load.running -= 1
