"""Load on a server, and what it felt like: prompts and outputs of mixed lengths, in closed or open loop.

Closed loop: so many clients, each asks again when it has its answer. Open loop: requests arrive at a rate, by a
Poisson process, whether or not earlier ones are answered; waiting counts from the arrival, so that a server that
falls behind looks as bad as it is. In: a `Target` of `target`. Out: a `Run` of `Sample`s. Next:
`report`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...errors import FastgenError

LETTERS = range(10, 250)  # token ids that any model has


class Target(Protocol):
    """What is measured."""

    def generate(self, prompt_ids: list[int], max_tokens: int) -> AsyncIterator[int]:
        """Generate exactly `max_tokens`; yields how many came, as they come."""


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt_ids: list[int]
    max_tokens: int


@dataclass
class Sample:
    """One request, as its client saw it; seconds from its arrival.

    Attributes:
        arrivals: (seconds, tokens) each time that something came.
        error: why it was not answered, or empty.
    """

    num_prompt_tokens: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    error: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens of output."""
        return sum(tokens for _, tokens in self.arrivals)

    @property
    def first_s(self) -> float:
        """To the first token."""
        return self.arrivals[0][0]

    @property
    def whole_s(self) -> float:
        """To the last token."""
        return self.arrivals[-1][0]

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens; tokens that come together share the time since the ones before."""
        gaps: list[float] = []
        for (before_s, _), (at_s, tokens) in zip(self.arrivals, self.arrivals[1:], strict=False):
            gaps += [(at_s - before_s) / tokens] * tokens
        return gaps


@dataclass(frozen=True)
class Run:
    """All requests at one load.

    Attributes:
        load: such as "8 clients" or "4 requests/s".
        elapsed_s: from the first arrival to the last token.
    """

    load: str
    samples: list[Sample]
    elapsed_s: float


def mixed(
    num_requests: int,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    seed: int,
    text: str = "",
) -> list[Ask]:
    """Requests with lengths spread evenly over these ranges, both ends included.

    The same `seed` gives the same lengths, the same `text` beside it the same prompts: loads that are compared have the
    first in common, but not the second, for a prefix cache would know their prompts.
    """
    lengths, letters = random.Random(seed), random.Random(f"{seed} {text}")
    return [
        Ask(letters.choices(LETTERS, k=lengths.randint(*prompt_tokens)), lengths.randint(*output_tokens))
        for _ in range(num_requests)
    ]


async def closed_loop(target: Target, asks: Sequence[Ask], clients: int, done: Callable[[], object]) -> Run:
    """Ask with so many clients; `done` is called after each request."""
    waiting = list(reversed(asks))
    samples: list[Sample] = []

    async def client() -> None:
        while waiting:
            ask = waiting.pop()
            samples.append(await _ask(target, ask, time.perf_counter()))
            done()

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Run(f"{clients} clients", samples, time.perf_counter() - started_s)


async def open_loop(
    target: Target, asks: Sequence[Ask], rate: float, seed: int, done: Callable[[], object]
) -> Run:
    """Ask at `rate` requests a second; `done` is called after each request."""
    dice = random.Random(seed)
    samples: list[Sample] = []

    async def one(ask: Ask, arrives_s: float) -> None:
        await asyncio.sleep(max(0.0, arrives_s - time.perf_counter()))
        samples.append(await _ask(target, ask, arrives_s))
        done()

    started_s = arrives_s = time.perf_counter()
    tasks = []
    for ask in asks:
        tasks.append(asyncio.ensure_future(one(ask, arrives_s)))
        arrives_s += dice.expovariate(rate)
    await asyncio.gather(*tasks)
    return Run(f"{rate:g} requests/s", samples, time.perf_counter() - started_s)


async def _ask(target: Target, ask: Ask, arrived_s: float) -> Sample:
    sample = Sample(len(ask.prompt_ids))
    try:
        async for num_tokens in target.generate(ask.prompt_ids, ask.max_tokens):
            sample.arrivals.append((time.perf_counter() - arrived_s, num_tokens))
    except (FastgenError, OSError) as error:
        sample.error = str(error) or type(error).__name__
    if not sample.error and not sample.num_tokens:
        sample.error = "no token came"
    return sample
