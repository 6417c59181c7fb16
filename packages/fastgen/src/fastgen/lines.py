"""What an engine keeps of each sequence beside its tokens: its text, its grammar, its log-probabilities.

In: tokens, as `sampler` chooses them. Out: whether the sequence has ended, and why; and what is to be told of it.
Next: `engine`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .grammar import Grammar
from .output import Output, TokenLogprobs
from .request import FinishReason, Sequence
from .seen import Seen
from .text import TextStream


@dataclass
class Line:
    """One sequence's.

    Attributes:
        new_ids, new_text, new_logprobs: what has not been told yet.
        longest: tokens that prompt and output may have.
    """

    sequence: Sequence
    text: TextStream
    grammar: Grammar | None
    eos_ids: frozenset[int]
    longest: int
    new_ids: list[int] = field(default_factory=list)
    new_text: str = ""
    new_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _seen: Seen | None = None

    def counted(self, drafts: tuple[int, ...]) -> Seen:
        """The tokens so far, and guesses after them."""
        sequence = self.sequence
        self._seen = self._seen or Seen()
        self._seen.follow(sequence.token_ids, sequence.num_prompt_tokens)
        if not drafts:
            return self._seen
        return self._seen.copy().follow([*sequence.token_ids, *drafts], sequence.num_prompt_tokens)

    def banned(self, ahead: int = 0, allowed: npt.NDArray[np.bool_] | None = None) -> tuple[int, ...]:
        """Tokens that may not come yet, after so many more than there are; none where a grammar allows no others."""
        params = self.sequence.request.params
        if self.sequence.num_output_tokens + ahead >= params.min_tokens:
            return ()
        ends = (*self.eos_ids, *params.stop_token_ids)
        return ends if allowed is None or np.delete(allowed, list(ends)).any() else ()

    def push(self, token_id: int, logprobs: TokenLogprobs | None) -> FinishReason | None:
        """Append a token; why the sequence ends with it, if it does."""
        sequence, params = self.sequence, self.sequence.request.params
        sequence.token_ids.append(token_id)
        self.new_ids.append(token_id)
        if logprobs is not None:
            self.new_logprobs.append(logprobs)
        complete = self.grammar is not None and self.grammar.advance(token_id)
        failed = complete and self.grammar is not None and self.grammar.failed
        may_stop = sequence.num_output_tokens >= params.min_tokens
        if may_stop and self.ends(token_id) and not failed:
            return FinishReason.STOP
        self.new_text += self.text.push(token_id, may_stop=may_stop)
        if self.text.stopped or (complete and not failed):
            return FinishReason.STOP
        return FinishReason.LENGTH if failed or sequence.num_tokens >= self.longest else None

    def ends(self, token_id: int) -> bool:
        """The token is an end, which has no text."""
        params = self.sequence.request.params
        return token_id in params.stop_token_ids or (token_id in self.eos_ids and not params.ignore_eos)

    def fork(self, sequence: Sequence) -> Line:
        """That of a sequence that goes on from here."""
        return Line(
            sequence,
            self.text.fork(),
            None if self.grammar is None else self.grammar.fork(),
            self.eos_ids,
            self.longest,
            list(self.new_ids),
            self.new_text,
            list(self.new_logprobs),
            None if self._seen is None else self._seen.copy(),
        )

    def tell(self, reason: FinishReason | None, prompt_logprobs: list[TokenLogprobs] | None = None) -> Output:
        """What is new; with a reason, the last."""
        request = self.sequence.request
        text = self.new_text + (self.text.finish() if reason is not None else "")
        output = Output(
            request.id,
            self.sequence.index,
            self.new_ids,
            text,
            reason,
            len(request.prompt_ids),
            request.num_cached_tokens,
            self.new_logprobs if request.params.logprobs is not None else None,
            prompt_logprobs,
        )
        self.new_ids, self.new_text, self.new_logprobs = [], "", []
        return output
