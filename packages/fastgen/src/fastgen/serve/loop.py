"""The bridge between an event loop and an engine: one thread drives the engine, streams bring its outputs back.

In: prompts with their parameters (`Job`). Out: a `Stream`. Everything that touches the engine is a command that the
thread obeys between two steps; a step's outputs cross back in one call. When a step raises, every request ends with a
`StepError`, and the next ones are served; when `MOST_FAILED_STEPS` in a row have, or one of an engine that processes
share (`MayBeLost`), everything ends with an `EngineError` and the loop stays failed. Next: `stream`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from ..errors import FastgenError, ModelError, OverloadedError
from ..output import Output, Stats
from .adapter_names import Adapter
from .interface import Engine, EngineError, Job, MayBeLost, StepError, Watch
from .stream import Stream

logger = logging.getLogger(__name__)
T = TypeVar("T")
Command = Callable[[], None]
LOST_TIMEOUT_S = 5.0
MOST_FAILED_STEPS = 3


class EngineLoop:
    """Runs an engine in a thread of its own for the event loop in which it is started.

    Args:
        engine: nobody else may use it until `close`.
        watch: is told of every request and step, in the event loop's thread.
        max_queued: prompts without a first token; more are refused.
    """

    def __init__(self, engine: Engine, *, watch: Watch | None = None, max_queued: int = 1024) -> None:
        self._engine = engine
        self._watch = watch
        self._max_queued = max_queued
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._embedding = asyncio.Lock()
        self._answers: set[asyncio.Future[Any]] = set()
        self._streams: dict[str, Stream] = {}
        self._unstarted: set[str] = set()
        self._adapters: dict[str, tuple[int, ...]] = {}
        self._failed_adapters: dict[str, tuple[tuple[int, ...], str]] = {}
        self._lock = threading.Lock()
        self._outbox: list[tuple[list[Output] | None, Stats, float]] = []
        self.stats = Stats()
        self.failure: EngineError | None = None
        self.failed = asyncio.Event()

    # -- the event loop's side ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.stats = self._engine.stats()
        self._thread = threading.Thread(target=self._drive, name="fastgen-engine", daemon=True)
        self._thread.start()
        if isinstance(self._engine, MayBeLost):
            self._engine.watch(lambda error: self._tell(self._fail, error))

    async def close(self) -> None:
        """Abort what runs and end the thread."""
        self.fail_all(EngineError("the engine is shut down"))
        for stream in set(self._streams.values()):
            stream.close()
        if self._thread is not None:
            self._commands.put(None)
            # A lost engine may never come back from its last step.
            await asyncio.to_thread(self._thread.join, None if self.failure is None else LOST_TIMEOUT_S)
            self._thread = None

    @property
    def num_open(self) -> int:
        """Prompts that somebody waits for."""
        return len(self._streams)

    async def open(self, request_id: str, jobs: Sequence[Job], *, arrived_s: float | None = None) -> Stream:
        """Queue prompts that are asked for together.

        Args:
            request_id: unique; the engine's requests are called so, with a number.
            jobs: with the same `n` each.
            arrived_s: when they were asked for (`time.perf_counter`); None: now.

        Raises:
            OverloadedError: the queue is full.
            RequestError: the engine refuses one of them; none is queued then.
            EngineError: the engine has failed.
        """
        self._check()
        if len(self._unstarted) + len(jobs) > self._max_queued:
            raise OverloadedError(
                f"expected at most {self._max_queued} prompts in the queue, "
                f"got {len(jobs)} beside {len(self._unstarted)} there; try again later"
            )
        names = [f"{request_id}-{number}" for number in range(len(jobs))]
        stream = Stream(names, jobs[0].params.n, self._closed)
        for name in names:
            self._streams[name] = stream
            self._unstarted.add(name)
            if self._watch is not None:
                self._watch.begun(name, time.perf_counter() if arrived_s is None else arrived_s)
        try:
            await self._call(lambda: self._add(names, jobs))
        except Exception:
            stream.refused()
            stream.close()
            raise
        except BaseException:
            # Also where the caller is cancelled: the thread may have added them, or be about to.
            stream.close()
            raise
        return stream

    async def embed(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        """A vector for each prompt; one forward of one of them between two steps."""
        return [await self._embed(ids) for ids in prompts]

    async def load_adapter(self, adapter: Adapter) -> None:
        """Load an adapter between two steps, unless it has been; in place of the one that its name had before.

        Raises:
            ModelError: the engine cannot; nor is it asked again, as long as the files are the same.
            RequestError: somebody still uses the one before.
        """
        if self._adapters.get(adapter.name) != adapter.stamp:
            self._check()
            await self._call(partial(self._load_adapter, adapter))

    def fail_all(self, error: Exception) -> None:
        """End every stream with `error`."""
        for stream in set(self._streams.values()):
            stream.fail(error)

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._thread is None:
            raise EngineError("expected a started engine loop, got one that is not; call start()")

    def _closed(self, stream: Stream) -> None:
        for request_id in stream.unfinished:
            self._commands.put(partial(self._engine.abort, request_id))
        for request_id in stream.request_ids:
            self._streams.pop(request_id, None)
            self._unstarted.discard(request_id)
            if self._watch is not None:
                self._watch.ended(request_id, stream.num_unfinished(request_id), time.perf_counter())

    async def _embed(self, ids: list[int]) -> list[float]:
        async with self._embedding:
            self._check()
            while (vector := await self._call(partial(self._engine.embed, ids))) is None:
                pass
            return vector

    async def _call(self, function: Callable[[], T]) -> T:
        """Run `function` in the engine's thread, between two steps."""
        assert self._loop is not None
        answer: asyncio.Future[T] = self._loop.create_future()
        self._answers.add(answer)
        self._commands.put(lambda: self._answer(function, answer))
        try:
            return await answer
        finally:
            self._answers.discard(answer)

    def _deliver(self) -> None:
        """Hand what steps said to the streams."""
        with self._lock:
            outbox, self._outbox = self._outbox, []
        for outputs, stats, at_s in outbox:
            self.stats = stats
            for output in outputs or ():
                self._unstarted.discard(output.request_id)
                stream = self._streams.get(output.request_id)
                if stream is not None:  # nobody waits for one that was aborted while the step ran
                    stream.push(output)
            if self._watch is not None and outputs is not None:
                self._watch.stepped(outputs, stats, at_s)

    def _end(self, request_ids: Sequence[str], error: StepError) -> None:
        for stream in {self._streams[name] for name in request_ids if name in self._streams}:
            stream.fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.failure is not None:
            return
        self.failure = EngineError(
            f"the engine has failed ({type(error).__name__}: {error}); restart the server"
        )
        self.fail_all(self.failure)
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(self.failure)
        self.failed.set()

    # -- the engine's thread -----------------------------------------------------------------------------

    def _drive(self) -> None:
        """Obey and step until told to stop, or until the engine has failed."""
        failures = 0
        try:
            while self._obey():
                if not self._engine.has_work:
                    continue
                try:
                    outputs = self._engine.step()
                except Exception as error:
                    failures += 1
                    # Ranks that have not all failed alike are in no common state.
                    if failures == MOST_FAILED_STEPS or isinstance(self._engine, MayBeLost):
                        raise
                    self._start_over(error)
                else:
                    failures = 0
                    self._publish(outputs)
        except BaseException as error:  # whatever it is, those who wait must hear of it
            logger.exception("the engine has failed")
            self._tell(self._fail, error)

    def _start_over(self, error: Exception) -> None:
        """End every request: any may be what the step failed at, and all are left where it stopped."""
        logger.exception("a step has failed; its requests end")
        request_ids = list(
            self._streams
        )  # also those that are not added yet: they end, and are aborted, alike
        for request_id in request_ids:
            self._engine.abort(request_id)
        self._publish(None)
        said = f"a step of the engine has failed ({type(error).__name__}: {error}); ask again"
        self._tell(self._end, request_ids, StepError(said))

    def _obey(self) -> bool:
        """Run the commands that are there, waiting for one if the engine has nothing to do; False to stop."""
        idle = not self._engine.has_work
        # Those that come meanwhile wait for a step, not it for them.
        num_commands = self._commands.qsize() or int(idle)
        for _ in range(num_commands):
            command = self._commands.get()
            if command is None:
                return False
            command()
        if num_commands and not self._engine.has_work:
            self._publish(None)  # an abort may have been the last thing for long
        return True

    def _add(self, names: Sequence[str], jobs: Sequence[Job]) -> None:
        added = []
        try:
            for name, job in zip(names, jobs, strict=True):
                self._engine.add(name, job.prompt_ids, job.params, priority=job.priority, adapter=job.adapter)
                added.append(name)
        except BaseException:
            for name in added:
                self._engine.abort(name)
            raise

    def _load_adapter(self, adapter: Adapter) -> None:
        name, stamp = adapter.name, adapter.stamp
        if self._adapters.get(name) == stamp:  # others have asked for it, too
            return
        failed = self._failed_adapters.get(name)
        if failed is not None and failed[0] == stamp:
            raise ModelError(failed[1])
        if name in self._adapters:
            self._engine.unload_adapter(name)
            del self._adapters[name]
        try:
            self._engine.load_adapter(name, adapter.directory)
        except FastgenError as error:
            self._failed_adapters[name] = stamp, str(error)
            raise ModelError(str(error)) from error
        self._adapters[name] = stamp

    def _answer(self, function: Callable[[], T], answer: asyncio.Future[T]) -> None:
        if answer.cancelled():  # nobody waits for it
            return
        try:
            result = function()
        except Exception as error:
            self._tell(_set_exception, answer, error)
        else:
            self._tell(_set_result, answer, result)

    def _publish(self, outputs: list[Output] | None) -> None:
        """Pass a step's outputs on (None: there was no step); steps that end meanwhile go in one call."""
        with self._lock:
            self._outbox.append((outputs, self._engine.stats(), time.perf_counter()))
            first = len(self._outbox) == 1
        if first:
            self._tell(self._deliver)

    def _tell(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *args)


def _set_result(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _set_exception(answer: asyncio.Future[T], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
