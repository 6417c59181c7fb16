"""The tokens of a forward: which rows of its logits they are chosen from, and what `sampler` must know of each.

In: the parts of a `StepPlan` that want logits, with their rows. Out: for each part its tokens. Next: `engine` appends
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from .jobs import Job
from .lines import Line
from .request import Sequence
from .sampler import Row, choose
from .step_plan import Scheduled


def begins_several(sequence: Sequence) -> bool:
    """The prompt has been computed, and all sequences of the request go on from here."""
    return sequence.num_output_tokens == 0 and sequence.request.params.num_sequences > 1


def last_rows(part: Scheduled, rows_LV: Tensor) -> Tensor:
    """The rows that follow its last token and each draft, without those of the prompt's log-probabilities."""
    return rows_LV[len(rows_LV) - 1 - len(part.drafts) :]


def choose_tokens(
    parts: Items[tuple[Scheduled, Tensor]], lines: Mapping[Sequence, Line], jobs: Mapping[str, Job]
) -> list[list[int]]:
    """Tokens for each part, all in one call of the sampler.

    Returns:
        One token for the last row and each draft; where a request begins several sequences, one for each; none for
        beams, which are chosen together (`beam_step`).
    """
    rows: list[list[Row]] = []
    logits: list[Tensor] = []
    for part, rows_LV in parts:
        sequence, request = part.sequence, part.sequence.request
        own = [] if request.params.beam_width else _rows(part, lines[sequence], jobs[request.id].seed)
        last_LV = last_rows(part, rows_LV)
        rows.append(own)
        logits.append(last_LV.expand(len(own), -1) if begins_several(sequence) else last_LV[: len(own)])
    tokens = iter(choose(torch.cat(logits), [row for own in rows for row in own]) if logits else [])
    return [[next(tokens) for _ in own] for own in rows]


def _rows(part: Scheduled, line: Line, seed: int) -> list[Row]:
    sequence, params = part.sequence, part.sequence.request.params
    indices = range(params.num_sequences) if begins_several(sequence) else [sequence.index]
    allowed = None if line.grammar is None else line.grammar.allowed()
    return [
        Row(
            params,
            seed,
            index,
            [*sequence.token_ids, *part.drafts[:ahead]] if ahead else sequence.token_ids,
            sequence.num_prompt_tokens,
            sequence.num_output_tokens + ahead,
            line.banned(ahead),
            allowed,
        )
        for ahead in range(1 + len(part.drafts))
        for index in indices
    ]
