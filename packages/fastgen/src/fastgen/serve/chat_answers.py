"""The answers of /v1/chat/completions: turns and what is added to them, with calls of tools. See `answers`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..output import Output
from .answer_schemas import (
    Answer,
    CalledFunction,
    CalledTool,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from .answers import LOWEST, Counted, Told, finish
from .prompts import Asked
from .schemas import ChatRequest
from .stream import Piece
from .token_text import TokenText
from .tools import Call, ToolReader


class ChatAnswers:
    """Answers `POST /v1/chat/completions`.

    Args:
        name: the request's.
        request: what was asked.
        asked: what the engine was asked.
        tokens: spells tokens.
    """

    def __init__(self, name: str, request: ChatRequest, asked: Asked, tokens: TokenText) -> None:
        self._name = name
        self._model = asked.model
        self._created = int(time.time())
        self._tool_names = asked.tools
        self._one_call = request.parallel_tool_calls is False
        self._tokens = tokens
        self._begun: set[int] = set()
        self._readers: dict[int, ToolReader] = {}
        self._counted = Counted()
        self._told = Told(request, self._counted)

    def whole(self, pieces: Sequence[Piece]) -> ChatCompletion:
        """The answer to a request that does not stream."""
        self._counted.add(pieces)
        choices = []
        for piece in pieces:
            text, calls = self._text_and_calls(piece.output)
            message = ChatMessage(role="assistant", content=None if calls and not text else text)
            if calls:
                message.tool_calls = [_called(call) for call in calls]
            choices.append(
                ChatChoice(
                    index=piece.output.index,
                    message=message,
                    logprobs=self._logprobs(piece.output),
                    finish_reason="tool_calls" if calls else finish(piece.output),
                )
            )
        return ChatCompletion(
            id=self._name,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self._counted.usage(),
        )

    def chunks(self, pieces: Sequence[Piece]) -> list[Answer]:
        """What a stream says of these pieces."""
        self._counted.add(pieces)
        return [self._chunk([self._delta(piece.output)], self._told.fields()) for piece in pieces]

    def last_chunks(self) -> list[Answer]:
        """What a stream says at the end."""
        return [self._chunk([], {"usage": self._counted.usage()})] if self._told.at_end else []

    def _chunk(self, choices: list[ChatChunkChoice], usage: dict[str, Usage | None]) -> ChatChunk:
        return ChatChunk(
            id=self._name,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **usage,
        )

    def _delta(self, output: Output) -> ChatChunkChoice:
        text, calls = self._text_and_calls(output)
        delta = ChatMessage(content=text)
        if output.index not in self._begun:
            self._begun.add(output.index)
            delta.role = "assistant"
        if calls:
            delta.tool_calls = [_called(call, number) for number, call in enumerate(calls)]
        return ChatChunkChoice(
            index=output.index,
            delta=delta,
            logprobs=self._logprobs(output),
            finish_reason="tool_calls" if calls else finish(output),
        )

    def _text_and_calls(self, output: Output) -> tuple[str, list[Call]]:
        if not self._tool_names:
            return output.text, []
        reader = self._readers.setdefault(output.index, ToolReader(self._tool_names))
        text = reader.add(output.text)
        if output.finish_reason is None:
            return text, []
        rest, calls = reader.finish()
        return text + rest, calls[:1] if self._one_call else calls

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        if output.logprobs is None:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._scored(each.token_id, each.logprob or 0.0),
                    top_logprobs=[TopLogprob(**self._scored(*top)) for top in each.top],
                )
                for each in output.logprobs
            ]
        )

    def _scored(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokens.as_text(token_id),
            "logprob": max(LOWEST, logprob),
            "bytes": list(self._tokens.as_bytes(token_id)),
        }


def _called(call: Call, index: int | None = None) -> CalledTool:
    number = {} if index is None else {"index": index}
    function = CalledFunction(name=call.name, arguments=call.arguments)
    return CalledTool(id=call.id, type="function", function=function, **number)
