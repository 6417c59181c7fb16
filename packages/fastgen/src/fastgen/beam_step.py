"""One step of a beam search over sequences of the cache: which go on, fork or are dropped, and what is told at the end.

In: a request's live beams with the logits that follow them. Out: the next beams' tokens appended, or outputs. `beams`
decides; here it is done. Next: `engine`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .jobs import Job
from .lines import Line
from .output import Output
from .request import FinishReason, Sequence
from .sampler import Row, steered
from .scheduler import Scheduler
from .seen import Seen
from .text import continued


def advance_beams(
    job: Job,
    line: Line,
    beams: list[tuple[Sequence, Tensor]],
    scheduler: Scheduler,
    decode: Callable[[list[int]], str],
) -> tuple[list[Sequence], list[Output]]:
    """Choose the next tokens among all beams; call it after `commit`.

    Args:
        job: of the search.
        line: of any of its beams: they have the same ends.
        beams: all that live, with float32 logits `[vocab]`.
        scheduler: that they run in.
        decode: token ids to text.

    Returns:
        The beams that go on, each with its next token; or none, and the best sequences.
    """
    search, params = job.beams, job.request.params
    assert search is not None
    sequences = [sequence for sequence, _ in beams]
    rows = [
        Row(
            params,
            job.seed,
            at,
            each.num_output_tokens,
            line.banned(),
            seen=Seen().follow(each.token_ids, each.num_prompt_tokens) if params.has_penalties else None,
        )
        for at, each in enumerate(sequences)
    ]
    # Penalties of log-probabilities, not of logits: as transformers has them.
    logprobs_BV = steered(torch.stack([row_V for _, row_V in beams]).log_softmax(-1), rows)
    values, ids = logprobs_BV.topk(min(2 * params.beam_width, logprobs_BV.shape[1]))
    following = search.advance(
        [sequence.output_ids for sequence in sequences],
        [sequence.cumulative_logprob for sequence in sequences],
        [list(zip(*each, strict=True)) for each in zip(ids.tolist(), values.tolist(), strict=True)],
        line.ends,
    )
    if not following:
        return [], _end(job, scheduler, sequences, [], decode)
    children = _grow(scheduler, sequences, [beam.parent for beam in following])
    for child, beam in zip(children, following, strict=True):
        child.token_ids.append(beam.token_id)
        child.cumulative_logprob = beam.logprob
    if children[0].num_tokens >= line.longest:
        return [], _end(job, scheduler, children, children, decode)
    return children, []


def _grow(scheduler: Scheduler, sequences: list[Sequence], parents: list[int]) -> list[Sequence]:
    """A sequence for each parent named: itself, or a fork of it; those not named are dropped."""
    own = {at: [sequences[at]] for at in set(parents)}
    for at, made in own.items():
        if parents.count(at) > 1:
            made += scheduler.fork(sequences[at], parents.count(at) - 1)
    for at, sequence in enumerate(sequences):
        if at not in own:
            scheduler.drop(sequence)
    return [own[at].pop() for at in parents]


def _end(
    job: Job,
    scheduler: Scheduler,
    live: list[Sequence],
    unended: list[Sequence],
    decode: Callable[[list[int]], str],
) -> list[Output]:
    """The search is over: the best of those that have ended, and of those cut off at the greatest length."""
    assert job.beams is not None
    request = job.request
    best = job.beams.best(
        request.params.n,
        [sequence.output_ids for sequence in unended],
        [sequence.cumulative_logprob for sequence in unended],
    )
    for sequence in live:
        scheduler.finish(sequence, FinishReason.LENGTH)
    before = request.prompt_ids if request.params.continues else []
    return [
        Output(
            request.id,
            index,
            each.token_ids,
            continued(decode, before, each.token_ids[:-1] if each.ended else each.token_ids),
            FinishReason.STOP if each.ended else FinishReason.LENGTH,
            len(request.prompt_ids),
            request.num_cached_tokens,
            prompt_logprobs=job.tell_prompt(),
        )
        for index, each in enumerate(best)
    ]
