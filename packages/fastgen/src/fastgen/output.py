"""What an engine says: what a step added to a sequence, and what the engine is busy with.

`Engine.step()` returns a list of `Output`, `Engine.stats()` a `Stats`. Next: `llm` gathers outputs into completions,
`serve` sends them over HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

from .request import FinishReason


@dataclass(frozen=True)
class TokenLogprobs:
    """A token and how likely it was, and the most likely ones in its place.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability before temperature, penalties and filters; None for the first
            token of a prompt, which follows nothing.
        top: (token id, log-probability), the most likely first; as many as were asked for.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What one step added to one sequence of a request.

    Attributes:
        request_id: the request's name.
        index: of the returned sequence, 0 to n - 1. With `best_of` or beams these are only known at the end, and each
            comes in one output that holds everything.
        new_token_ids: tokens added: several with speculative decoding, none in a step that only ends the sequence.
        text: what can be shown of them: whole characters, without text that may yet turn out to be a stop. At the end
            the rest, without the stop.
        finish_reason: None while the sequence goes on.
        logprobs: one for each of `new_token_ids` if the request asked for them.
        prompt_logprobs: in the first output of a request that asked for them, one for each token of the prompt.
        num_prompt_tokens: tokens of the prompt.
        num_cached_tokens: of them, those whose keys and values the prefix cache had.
    """

    request_id: str
    index: int
    new_token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Stats:
    """What an engine is busy with; the counts with `total` in their name grow from its start.

    Attributes:
        waiting: sequences in the queue.
        running: sequences that take part in forwards.
        swapped: sequences whose blocks are in host memory.
        blocks_used: cache blocks that sequences hold.
        blocks_total: cache blocks that there are.
        batch_tokens: tokens of the last forward.
        preempted_total: times that a sequence lost its blocks.
        prefix_hit_tokens_total: prompt tokens that the prefix cache had.
        prompt_tokens_total: prompt tokens of requests that were begun.
        generated_tokens_total: tokens chosen.
        drafted_tokens_total: tokens guessed.
        accepted_tokens_total: of them, those that were right.
    """

    waiting: int = 0
    running: int = 0
    swapped: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    batch_tokens: int = 0
    preempted_total: int = 0
    prefix_hit_tokens_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    drafted_tokens_total: int = 0
    accepted_tokens_total: int = 0
