"""PURE: beam search: which beams go on with which token, and which have ended.

In: log-probabilities of the tokens that may follow each beam. Out: the next beams, by parent. A beam's score is its
log-probability over its length to the power of `length_penalty`; the search ends when no running beam, as it stands
now, passes the worst of `width` ended ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Hypothesis:
    """A sequence that has ended: its output, its log-probability and its score."""

    token_ids: list[int]
    logprob: float
    score: float
    ended: bool = True


@dataclass(frozen=True)
class Next:
    """A beam of the next step.

    Attributes:
        parent: position of the beam that it goes on from.
        token_id: with which token.
        logprob: of its output, with the token.
    """

    parent: int
    token_id: int
    logprob: float


@dataclass
class BeamSearch:
    """One request's search.

    Args:
        width: beams.
        length_penalty: see the module.
    """

    width: int
    length_penalty: float
    done: list[Hypothesis] = field(default_factory=list)

    def advance(
        self,
        outputs: Sequence[list[int]],
        logprobs: Sequence[float],
        candidates: Sequence[Sequence[tuple[int, float]]],
        is_end: Callable[[int], bool],
    ) -> list[Next]:
        """The next beams; none when the search is over.

        Args:
            outputs: of the running beams, without the next token.
            logprobs: of them.
            candidates: for each at least `2 * width` of the most likely next tokens (or all) with log-probabilities.
            is_end: whether a token ends a beam.
        """
        ranked = sorted(
            (
                Next(parent, token, logprobs[parent] + logprob)
                for parent, each in enumerate(candidates)
                for token, logprob in each
            ),
            key=lambda beam: (-beam.logprob, beam.parent, beam.token_id),
        )
        going: list[Next] = []
        for rank, beam in enumerate(ranked):
            if not is_end(beam.token_id):
                going.append(beam)
            elif rank < self.width:  # an end that is not among the best says nothing
                self._end([*outputs[beam.parent], beam.token_id], beam.logprob)
            if len(going) == self.width:
                break
        if len(self.done) >= self.width and going:
            length = len(outputs[going[0].parent]) + 1
            if self._score(going[0].logprob, length) <= min(each.score for each in self.done):
                return []
        return going

    def best(
        self, count: int, outputs: Sequence[list[int]] = (), logprobs: Sequence[float] = ()
    ) -> list[Hypothesis]:
        """The best at the end, running ones (of length reached) among them."""
        running = [
            Hypothesis(list(ids), logprob, self._score(logprob, len(ids)), ended=False)
            for ids, logprob in zip(outputs, logprobs, strict=True)
        ]
        return sorted([*self.done, *running], key=lambda each: -each.score)[:count]

    def _end(self, token_ids: list[int], logprob: float) -> None:
        self.done.append(Hypothesis(token_ids, logprob, self._score(logprob, len(token_ids))))
        self.done.sort(key=lambda each: -each.score)
        del self.done[self.width :]

    def _score(self, logprob: float, length: int) -> float:
        return float(logprob / max(length, 1) ** self.length_penalty)
