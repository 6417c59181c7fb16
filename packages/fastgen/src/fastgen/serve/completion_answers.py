"""The answers of /v1/completions: text, with log-probabilities in lists side by side. See `answers`."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence

from ..output import TokenLogprobs
from .answer_schemas import Answer, Completion, CompletionChoice, CompletionLogprobs, Usage
from .answers import LOWEST, Counted, Told, finish
from .prompts import Asked
from .schemas import CompletionRequest
from .stream import Piece
from .token_text import TokenText


class _Span:
    """How many characters of a sequence's text its tokens have made; some make part of one."""

    def __init__(self, tokens: TokenText, *, is_first: bool) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0
        self._is_first = is_first  # there is no text before what comes

    def add(self, token_id: int) -> int:
        """Where the token begins."""
        start = self._num_characters
        shown = self._tokens.shown(token_id, first=self._is_first)
        self._is_first = self._is_first and token_id in self._tokens.special
        self._num_characters += len(self._decoder.decode(shown))
        return start


class CompletionAnswers:
    """Answers `POST /v1/completions`.

    Args:
        name: the request's.
        request: what was asked.
        asked: what the engine was asked.
        tokens: spells tokens.
        echoes: the prompts' texts, if they are to come before the outputs.
    """

    def __init__(
        self,
        name: str,
        request: CompletionRequest,
        asked: Asked,
        tokens: TokenText,
        echoes: Sequence[str] = (),
    ) -> None:
        self._name = name
        self._model = asked.model
        self._created = int(time.time())
        self._num_each = asked.jobs[0].params.n
        self._prompts = [job.prompt_ids for job in asked.jobs]
        self._echoes = echoes
        self._scores_only = request.max_tokens == 0
        self._tokens = tokens
        self._spans: dict[int, _Span] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self._counted = Counted()
        self._told = Told(request, self._counted)

    def whole(self, pieces: Sequence[Piece]) -> Completion:
        """The answer to a request that does not stream."""
        self._count(pieces)
        return self._completion([self._choice(piece) for piece in pieces], {"usage": self._counted.usage()})

    def chunks(self, pieces: Sequence[Piece]) -> list[Answer]:
        """What a stream says of these pieces."""
        self._count(pieces)
        return [self._completion([self._choice(piece)], self._told.fields()) for piece in pieces]

    def last_chunks(self) -> list[Answer]:
        """What a stream says at the end."""
        return [self._completion([], {"usage": self._counted.usage()})] if self._told.at_end else []

    def _count(self, pieces: Sequence[Piece]) -> None:
        self._counted.add(pieces, generated=not self._scores_only)

    def _completion(self, choices: list[CompletionChoice], usage: dict[str, Usage | None]) -> Completion:
        return Completion(
            id=self._name,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            **usage,
        )

    def _choice(self, piece: Piece) -> CompletionChoice:
        output = piece.output
        index = piece.prompt * self._num_each + output.index
        text = "" if self._scores_only else output.text
        prompt: list[TokenLogprobs] = []
        scored = [] if self._scores_only else list(output.logprobs or ())
        if output.prompt_logprobs is not None:  # comes once; sequences of the same prompt share it
            self._prompt_logprobs[piece.prompt] = output.prompt_logprobs
        if self._echoes and index not in self._spans:
            text = self._echoes[piece.prompt] + text
            prompt = self._prompt_logprobs.get(piece.prompt, [])
        is_first = bool(self._echoes) or self._tokens.special.issuperset(self._prompts[piece.prompt])
        span = self._spans.setdefault(index, _Span(self._tokens, is_first=is_first))
        logprobs = None if output.logprobs is None else self._logprobs(prompt, scored, span)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish(output))

    def _logprobs(
        self, prompt: list[TokenLogprobs], output: list[TokenLogprobs], span: _Span
    ) -> CompletionLogprobs:
        scored = prompt + output
        offsets = [span.add(each.token_id) for each in scored]
        return CompletionLogprobs(
            tokens=[self._tokens.as_text(each.token_id) for each in scored],
            token_logprobs=[None if each.logprob is None else max(LOWEST, each.logprob) for each in scored],
            top_logprobs=[self._top(each) for each in scored],
            text_offset=offsets,
        )

    def _top(self, scored: TokenLogprobs) -> dict[str, float] | None:
        if scored.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in [*scored.top, (scored.token_id, scored.logprob)]:
            top.setdefault(self._tokens.as_text(token_id), max(LOWEST, logprob))
        return top
