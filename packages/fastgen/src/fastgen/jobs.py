"""What an engine keeps of each request beside its sequences: its seed, its search, what has been told of it.

In: sequences that end. Out: which of them are returned, and when. Next: `engine`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .beams import BeamSearch
from .lines import Line
from .output import Output, TokenLogprobs
from .request import FinishReason, Request
from .sampler import logprobs_of
from .step_plan import Scheduled


@dataclass
class Job:
    """A request and what is kept of it.

    Attributes:
        seed: given, or drawn.
        beams: of a beam search, or None.
    """

    request: Request
    seed: int
    beams: BeamSearch | None = None
    _prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _is_prompt_told: bool = False
    _held_back: list[tuple[Line, FinishReason]] = field(default_factory=list)

    @property
    def holds_back(self) -> bool:
        """Which sequences are returned is known when all have ended (`best_of`)."""
        params = self.request.params
        return params.best_of is not None and params.best_of > params.n

    def tell(self, line: Line, reason: FinishReason | None, *, is_last: bool) -> list[Output]:
        """What can be told now of one of its sequences, or of those held back when this was the last."""
        if not self.holds_back:
            return [line.tell(reason, self.tell_prompt())]
        if reason is not None:
            self._held_back.append((line, reason))
        if not is_last:
            return []
        self._held_back.sort(key=lambda each: -each[0].sequence.mean_logprob)
        outputs = []
        for index, (best, why) in enumerate(self._held_back[: self.request.params.n]):
            best.sequence.index = index
            outputs.append(best.tell(why, self.tell_prompt()))
        return outputs

    def keep_prompt_logprobs(self, part: Scheduled, logits_LV: Tensor, rows: range) -> None:
        """Of a chunk of its prompt, if it asked for them; each once, also when the prompt is computed again."""
        sequence, count = part.sequence, self.request.params.prompt_logprobs
        if count is None or part.start >= sequence.num_prompt_tokens:
            return
        kept = self._prompt_logprobs
        if not kept:
            kept.append(TokenLogprobs(sequence.token_ids[0], None))
        for position in range(len(kept), min(part.start + part.num_tokens + 1, sequence.num_prompt_tokens)):
            row_V = logits_LV[rows[position - 1 - part.start]]
            kept.append(logprobs_of(row_V, sequence.token_ids[position], count))

    def tell_prompt(self) -> list[TokenLogprobs] | None:
        """The prompt's log-probabilities, with the first output alone."""
        if self.request.params.prompt_logprobs is None or self._is_prompt_told:
            return None
        self._is_prompt_told = True
        return self._prompt_logprobs
