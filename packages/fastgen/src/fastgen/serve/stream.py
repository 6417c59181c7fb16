"""Outputs on their way to one reader; what is not read yet is merged, so that a slow reader costs little.

In: `Output`s of one or several prompts that were asked for together, pushed by `loop`. Out: `Piece`s, which
`answers` turns into JSON. All of it happens in the event loop's thread. Memory is bounded by what the requests may
generate: one merged output for each sequence, however long nobody reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..output import Output, TokenLogprobs
from ..request import FinishReason


@dataclass(frozen=True)
class Piece:
    """What came of one sequence since it was last read.

    Attributes:
        prompt: number of the prompt among those asked for together.
        output: all that came, as if one step had added it.
    """

    prompt: int
    output: Output


@dataclass
class _Unread:
    """Outputs of one sequence that nobody read yet; parts are joined when they are."""

    first: Output
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None

    def add(self, output: Output) -> None:
        self.texts.append(output.text)
        self.token_ids += output.new_token_ids
        if output.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += output.logprobs
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.finish_reason = output.finish_reason or self.finish_reason

    def joined(self) -> Output:
        return replace(
            self.first,
            new_token_ids=self.token_ids,
            text="".join(self.texts),
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            finish_reason=self.finish_reason,
        )


class Stream:
    """The outputs of some prompts, for one reader.

    Args:
        request_ids: the engine's names for the prompts, in order.
        num_sequences: that each of them returns.
        closed: called once, when the reader is done or gone.
    """

    def __init__(
        self, request_ids: Sequence[str], num_sequences: int, closed: Callable[[Stream], None]
    ) -> None:
        self.request_ids = tuple(request_ids)
        self._prompts = {request_id: number for number, request_id in enumerate(request_ids)}
        self._unfinished = dict.fromkeys(request_ids, num_sequences)
        self._unread: dict[tuple[int, int], _Unread] = {}
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._closed: Callable[[Stream], None] | None = closed

    @property
    def unfinished(self) -> list[str]:
        """Engine requests that have sequences still to end."""
        return [request_id for request_id, left in self._unfinished.items() if left > 0]

    def num_unfinished(self, request_id: str) -> int:
        """Sequences of an engine request that are still to end."""
        return self._unfinished[request_id]

    def refused(self) -> None:
        """The engine has taken none of the prompts: nothing is to end."""
        self._unfinished = dict.fromkeys(self._unfinished, 0)

    def push(self, output: Output) -> None:
        """Take one output of the engine."""
        if output.finish_reason is not None:
            self._unfinished[output.request_id] -= 1
        prompt = self._prompts[output.request_id]
        unread = self._unread.get((prompt, output.index))
        if unread is None:
            unread = self._unread[prompt, output.index] = _Unread(output)
        unread.add(output)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End with `error` at the reader's next step, whatever is still unread."""
        self._error = self._error or error
        self._news.set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether there is something to read (or an error, or the end) within `timeout_s`."""
        if not self._readable:
            # A timer costs a microsecond, `asyncio.wait_for` a task; this runs for every token of every stream.
            timer = asyncio.get_running_loop().call_later(timeout_s, self._news.set)
            try:
                await self._wait_for_news()
            finally:
                timer.cancel()
        return self._readable

    async def read(self) -> list[Piece]:
        """What came since the last call; waits for some. Empty at the end.

        Raises:
            Exception: what `fail` was given.
        """
        while not self._readable:
            await self._wait_for_news()
        return self._take()

    async def read_all(self) -> list[Piece]:
        """Everything, one piece a sequence, in order; waits for the end.

        Raises:
            Exception: what `fail` was given.
        """
        while self.unfinished and self._error is None:
            await self._wait_for_news()
        return sorted(self._take(), key=lambda piece: (piece.prompt, piece.output.index))

    @property
    def _readable(self) -> bool:
        return bool(self._unread) or self._error is not None or not self.unfinished

    async def _wait_for_news(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _take(self) -> list[Piece]:
        if self._error is not None:
            raise self._error
        pieces = [Piece(prompt, unread.joined()) for (prompt, _), unread in self._unread.items()]
        self._unread = {}
        return pieces

    def close(self) -> None:
        """The reader is done or gone: what still runs is aborted. Calling it again does nothing."""
        closed, self._closed = self._closed, None
        if closed is not None:
            closed(self)
