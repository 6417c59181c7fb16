"""Which tokens a sequence has, and how often its output has each: what penalties depend on.

In: token ids, each once, as they come: to count them all again at every token would take longer the longer the text.
Out: arrays that `sampler` indexes logits with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class Seen:
    """The tokens of one sequence.

    Attributes:
        ids: int64, each token once.
        times: float32, how often each of them is in the output.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._places: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._times = np.zeros(64, dtype=np.float32)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """See the class."""
        return self._ids[: len(self._places)]

    @property
    def times(self) -> npt.NDArray[np.float32]:
        """See the class."""
        return self._times[: len(self._places)]

    def follow(self, token_ids: Sequence[int], num_prompt_tokens: int) -> Seen:
        """Count those that have come since the last call; itself.

        Args:
            token_ids: prompt and output, which begin as at the last call.
            num_prompt_tokens: of them.
        """
        for at in range(self._num_tokens, len(token_ids)):
            token = token_ids[at]
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._times = np.concatenate([self._times, np.zeros_like(self._times)])
            self._ids[place] = token
            self._times[place] += at >= num_prompt_tokens
        self._num_tokens = len(token_ids)
        return self

    def copy(self) -> Seen:
        """Another that goes on from here."""
        other = Seen()
        other._num_tokens, other._places = self._num_tokens, dict(self._places)
        other._ids, other._times = self._ids.copy(), self._times.copy()
        return other
