"""The tokens of a forward: which rows of its logits they are chosen from, and what `sampler` must know of each.

In: logits, and the parts of a `StepPlan` that want them, with their rows. Out: for each part its tokens. Next: `engine`
appends them.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from .jobs import Job
from .lines import Line
from .request import Sequence
from .sampler import Row, choose, greatest
from .step_plan import Scheduled


def begins_several(sequence: Sequence) -> bool:
    """The prompt has been computed, and all sequences of the request go on from here."""
    return sequence.num_output_tokens == 0 and sequence.request.params.num_sequences > 1


def first_row(part: Scheduled, rows: range) -> int:
    """The row that follows its last token; before it are rows of the prompt, after it those of drafts."""
    return rows.stop - 1 - len(part.drafts)


def choose_tokens(
    parts: Items[tuple[Scheduled, range]],
    logits_LV: Tensor,
    lines: Mapping[Sequence, Line],
    jobs: Mapping[str, Job],
) -> list[list[int]]:
    """Tokens for each part, all in one call of the sampler.

    Args:
        parts: with the rows of their logits.
        logits_LV: float32.
        lines: of their sequences.
        jobs: of their requests.

    Returns:
        One token for the last row and each draft; where a request begins several sequences, one for each; none for
        beams, which are chosen together (`beam_step`).
    """
    if len(parts) == len(logits_LV) and all(_takes_greatest(part, lines[part.sequence]) for part, _ in parts):
        return [[token] for token in greatest(logits_LV)]
    chosen: list[list[Row]] = []
    at: list[int] = []
    for part, rows in parts:
        sequence, request = part.sequence, part.sequence.request
        own = [] if request.params.beam_width else _rows(part, lines[sequence], jobs[request.id].seed)
        first = first_row(part, rows)
        chosen.append(own)
        at += [first] * len(own) if begins_several(sequence) else range(first, first + len(own))
    if at != list(range(len(logits_LV))):
        logits_LV = logits_LV[torch.tensor(at, dtype=torch.int64, device=logits_LV.device)]
    tokens = iter(choose(logits_LV, [row for own in chosen for row in own]))
    return [[next(tokens) for _ in own] for own in chosen]


def _takes_greatest(part: Scheduled, line: Line) -> bool:
    """Whether a part's one row is all that its token depends on: `Row` would say nothing more."""
    sequence, params = part.sequence, part.sequence.request.params
    is_steered = line.grammar is not None or sequence.num_output_tokens < params.min_tokens
    return params.takes_greatest and not is_steered and not part.drafts


def _rows(part: Scheduled, line: Line, seed: int) -> list[Row]:
    sequence, params = part.sequence, part.sequence.request.params
    indices = range(params.num_sequences) if begins_several(sequence) else [sequence.index]
    allowed = None if line.grammar is None else line.grammar.allowed()
    return [
        Row(
            params,
            seed,
            index,
            sequence.num_output_tokens + ahead,
            line.banned(ahead, allowed),
            allowed,
            line.counted(part.drafts[:ahead]) if params.has_penalties else None,
        )
        for ahead in range(1 + len(part.drafts))
        for index in indices
    ]
