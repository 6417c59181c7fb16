"""One engine behind HTTP: what the routes of `app` call.

Holds the loop, the limits and the numbers, and stops in order. A request takes a place (`admission`), its prompt is
read in the reader's thread (`prompts`), the engine is asked (`loop`), and what comes back is sent whole or as events
(`answers`, `sse`); many log-probabilities the reader's thread writes, schemas are compiled in others. Whatever
happens on the way, the stream is closed and the place is free again at the end.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from ..errors import CacheError, ConfigError, ModelError, OverloadedError, RequestError
from ..request import SamplingParams
from .adapter_names import AdapterNames
from .admission import Admission
from .answer_schemas import Embeddings, Health, ServerStats, dumped
from .answers import Answers, has_many_logprobs
from .chat_answers import ChatAnswers
from .completion_answers import CompletionAnswers
from .embeddings import embeddings
from .errors import ApiError, overloaded
from .interface import Engine, EngineError, StepError
from .limits import ServerConfig
from .loop import EngineLoop
from .metrics import Metrics
from .prompts import Asked, Prompts
from .schemas import ChatRequest, CompletionRequest, EmbeddingRequest, Sampling
from .sse import EventStream, late, while_connected
from .stream import Stream
from .threads import Threads
from .token_text import TokenText

T = TypeVar("T")
COMPILE_TIMEOUT_S = 10.0
"""Of a schema: most take milliseconds, a few would take days, and nobody can interrupt them."""
COMPILERS = 2


class Service:
    """Answers requests with one engine.

    Args:
        engine: nobody else may use it meanwhile.
        config: see `ServerConfig`.

    Raises:
        ConfigError: an adapter is called as the model is, or see `AdapterNames`.
    """

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.config = config
        self.created = int(time.time())
        self.served_name = config.served_name or engine.model_name
        self.adapters = AdapterNames(config.adapters, config.adapter_folder)
        if self.served_name in self.adapters.all():
            raise ConfigError(
                f"adapters: expected names beside the model's own, got {self.served_name!r}, which is the model's; "
                "call one of them otherwise"
            )
        self.max_model_len = engine.max_model_len
        self.metrics = Metrics(lambda: self.loop.stats)
        self.loop = EngineLoop(engine, watch=self.metrics, max_queued=config.limits.queued)
        self.admission = Admission(config.limits.concurrent)
        self._engine = engine
        self._prompts = Prompts(
            engine.tokenizer,
            engine.max_model_len,
            engine.room,
            served_name=self.served_name,
            adapters=self.adapters,
            limits=config.limits,
        )
        self._tokens = TokenText(engine.tokenizer)
        self._reader = Threads(1, "fastgen-tokenizer")
        self._compilers = Threads(COMPILERS, "fastgen-grammar")
        self._over = asyncio.Event()

    async def complete(self, request: CompletionRequest, http: Request) -> Response:
        """`POST /v1/completions`."""

        def read() -> tuple[Asked, Answers]:
            asked, name = self._prompts.completion(request), f"cmpl-{uuid.uuid4().hex}"
            echoes = [self._prompts.text_of(job.prompt_ids) for job in asked.jobs] if request.echo else []
            return asked, CompletionAnswers(name, request, asked, self._tokens, echoes)

        return await self._generate(request, http, read)

    async def chat(self, request: ChatRequest, http: Request) -> Response:
        """`POST /v1/chat/completions`."""

        def read() -> tuple[Asked, Answers]:
            asked = self._prompts.chat(request)
            return asked, ChatAnswers(f"chatcmpl-{uuid.uuid4().hex}", request, asked, self._tokens)

        return await self._generate(request, http, read)

    async def embed(self, request: EmbeddingRequest, http: Request) -> Response:
        """`POST /v1/embeddings`."""

        async def work() -> Embeddings:
            prompts = await self._read(lambda: self._prompts.embedding(request))
            vectors = await self.loop.embed(prompts)
            return embeddings(request, prompts, vectors, request.model or self.served_name)

        self._check()
        with self.admission.slot():
            return _json(dumped(await self._within(http, work(), time.perf_counter())))

    async def models(self) -> list[str]:
        """Names for `GET /v1/models`."""
        return [self.served_name, *await self._read(self.adapters.all)]

    def health(self) -> Health:
        """`GET /health`."""
        if self.loop.failure is not None:
            return Health(status="failed", detail=str(self.loop.failure))
        return Health(status="stopping" if self.admission.stopping else "ok")

    def stats(self) -> ServerStats:
        """`GET /stats`."""
        stats = self.loop.stats
        shown = {name: getattr(stats, name) for name in ServerStats.model_fields if name != "requests"}
        return ServerStats(requests=self.admission.num_inside, **shown)

    async def open(self) -> None:
        """Nothing: the application's lifespan starts the loop."""

    async def drain(self, timeout_s: float) -> bool:
        """Let nobody in, wait for those inside, then end what is left; whether nothing was."""
        self.admission.stop()
        finished = await self.admission.wait_idle(timeout_s)
        self.loop.fail_all(overloaded("the server is shutting down", retry_after_s=10))
        self._over.set()  # for those that have no stream yet
        return finished

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False if somebody still is after `timeout_s`."""
        return await self.admission.wait_idle(timeout_s)

    async def wait_failed(self) -> Exception:
        """Wait until the engine has failed; gives the reason."""
        await self.loop.failed.wait()
        assert self.loop.failure is not None
        return self.loop.failure

    async def close(self) -> None:
        """End the threads; calling it again does nothing."""
        await self.loop.close()
        self._reader.close()
        self._compilers.close()

    # -- generating ----------------------------------------------------------------------------------------

    async def _generate(
        self, request: Sampling, http: Request, read: Callable[[], tuple[Asked, Answers]]
    ) -> Response:
        arrived_s = time.perf_counter()
        self._check()
        with ExitStack() as stack:
            stack.enter_context(self.admission.slot())
            stream, answers = await self._within(http, self._open(read, arrived_s, stack), arrived_s)
            if not request.stream:
                return _json(await self._within(http, self._whole(stream, answers), arrived_s))
            timeout_s = self.config.limits.request_timeout_s
            timer = asyncio.get_running_loop().call_later(
                arrived_s + timeout_s - time.perf_counter(), stream.fail, late(timeout_s)
            )
            stack.callback(timer.cancel)
            return EventStream(
                stream,
                answers,
                describe=describe,
                in_thread=self._read,
                write_timeout_s=self.config.limits.write_timeout_s,
                close=stack.pop_all().close,
            )

    async def _open(
        self, read: Callable[[], tuple[Asked, Answers]], arrived_s: float, stack: ExitStack
    ) -> tuple[Stream, Answers]:
        asked, answers = await self._read(read)
        await self._load(asked.jobs[0].adapter)  # they have the same
        await self._prepare(asked.jobs[0].params)  # they differ in `max_tokens` at most
        stream = await self.loop.open(uuid.uuid4().hex, asked.jobs, arrived_s=arrived_s)
        stack.callback(stream.close)
        return stream, answers

    async def _load(self, adapter: str | None) -> None:
        """Have the engine load an adapter that it has not."""
        if adapter is None:
            return
        found = await self._read(lambda: self.adapters.find(adapter))
        if found is None:
            return
        try:
            await self.loop.load_adapter(found)
        except RequestError as error:  # it was replaced, and requests still use the one before
            raise overloaded(f"adapter {adapter!r}: {error}") from error
        except ModelError as error:
            raise ApiError(
                500, f"adapter {adapter!r} cannot be loaded: {error}", code="adapter_failed"
            ) from error

    async def _prepare(self, params: SamplingParams) -> None:
        """Compile a schema beside all else, or refuse it; requests without one do not wait for those with one."""
        if self._engine.is_prepared(params):
            return
        begun = False

        def prepare() -> None:
            nonlocal begun
            begun = True
            self._engine.prepare(params)

        try:
            await asyncio.wait_for(self._compilers.run(prepare), COMPILE_TIMEOUT_S)
        except (asyncio.TimeoutError, TimeoutError) as error:
            if not begun:
                raise overloaded("all threads that compile schemas are busy; try again later") from error
            raise ApiError(
                400,
                "expected a schema or regular expression that is compiled within "
                f"{COMPILE_TIMEOUT_S:g} s, got one that takes longer; simplify it",
                code="schema_too_complex",
            ) from error

    async def _whole(self, stream: Stream, answers: Answers) -> str:
        pieces = await stream.read_all()

        def dump() -> str:
            return dumped(answers.whole(pieces))

        return await self._read(dump) if has_many_logprobs(pieces) else dump()

    async def _read(self, read: Callable[[], T]) -> T:
        return await self._reader.run(read)

    async def _within(self, http: Request, work: Coroutine[Any, Any, T], arrived_s: float) -> T:
        """Run `work` while the client is there, time is left and the server is not told to end."""
        timeout_s = self.config.limits.request_timeout_s
        left_s = max(0.0, arrived_s + timeout_s - time.perf_counter())
        try:
            return await while_connected(http.receive, work, left_s, self._over)
        except Exception as error:
            raise describe(error) from error

    def _check(self) -> None:
        if self.loop.failure is not None:
            raise overloaded(str(self.loop.failure), code="engine_failed", retry_after_s=60)


def describe(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (OverloadedError, CacheError)):
        return overloaded(str(error))
    if isinstance(error, (RequestError, ConfigError)):
        return ApiError(400, str(error), code="invalid_request")
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_failed")
    if isinstance(error, StepError):
        return ApiError(500, str(error), code="step_failed")
    raise error


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")
