"""From pieces of a stream to OpenAI's answers: what both kinds of completion share.

In: `Piece`s of `stream`. Out: models of `answer_schemas`. One object answers one request, whole or in chunks, and
remembers how far each of its sequences has come. Next: `completion_answers`, `chat_answers`; `service` sends whole
answers, `sse` chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..output import Output
from ..request import FinishReason
from .answer_schemas import Answer, CachedTokens, Finish, Usage
from .schemas import Sampling
from .stream import Piece

MANY_LOGPROBS = 1000
LOWEST = -9999.0  # what OpenAI sends for a probability of zero; JSON has no infinity
FINISH: dict[FinishReason, Finish] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


class Answers(Protocol):
    """Answers one request."""

    def whole(self, pieces: Sequence[Piece]) -> Answer:
        """The answer to a request that does not stream."""

    def chunks(self, pieces: Sequence[Piece]) -> list[Answer]:
        """What a stream says of these pieces."""

    def last_chunks(self) -> list[Answer]:
        """What a stream says at the end."""


class Counted:
    """Numbers of tokens so far."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._num_generated = 0

    def add(self, pieces: Sequence[Piece], *, generated: bool = True) -> None:
        """Count these pieces; without `generated`, their prompts alone."""
        for piece in pieces:
            output = piece.output
            self._prompts[piece.prompt] = (output.num_prompt_tokens, output.num_cached_tokens)
            self._num_generated += len(output.new_token_ids) if generated else 0

    def usage(self) -> Usage:
        """As it is sent."""
        num_prompt = sum(tokens for tokens, _ in self._prompts.values())
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_generated,
            total_tokens=num_prompt + self._num_generated,
            prompt_tokens_details=CachedTokens(
                cached_tokens=sum(cached for _, cached in self._prompts.values())
            ),
        )


class Told:
    """What a stream's chunks say of numbers of tokens."""

    def __init__(self, request: Sampling, counted: Counted) -> None:
        options = request.stream_options
        self.at_end = options is not None and options.include_usage
        self._always = options is not None and options.continuous_usage_stats
        self._counted = counted

    def fields(self) -> dict[str, Usage | None]:
        """The chunk's `usage`: OpenAI sends null in all but the last, if it is asked for at all."""
        if self._always:
            return {"usage": self._counted.usage()}
        return {"usage": None} if self.at_end else {}


def has_many_logprobs(pieces: Sequence[Piece]) -> bool:
    """Whether there are so many log-probabilities among them that to write them is no work for the event loop."""
    scored = [
        each for piece in pieces for each in (piece.output.logprobs, piece.output.prompt_logprobs) if each
    ]
    return sum(len(each) * (1 + len(each[-1].top)) for each in scored) > MANY_LOGPROBS


def finish(output: Output) -> Finish | None:
    """Why the sequence has ended, if it has."""
    return None if output.finish_reason is None else FINISH[output.finish_reason]
