"""A fake engine around a scheduler: no model, but a cache in which every slot says which tokens led to it.

A slot holds the hash of all tokens up to its own. Before each forward it is checked that what every sequence would
read is its own past, slot for slot; then its tokens are written. So wrong blocks, stale blocks, lost copies, wrong
prefix hits and writes into shared blocks all show as a slot that is not what it should be.
"""

from __future__ import annotations

import random
from collections import Counter

from fastgen.config import Schedule, SchedulePolicy
from fastgen.request import FinishReason, Request, SamplingParams, Sequence, Status
from fastgen.scheduler import Scheduler
from fastgen.step_plan import Scheduled, StepPlan


def make_scheduler(num_blocks: int = 64, block_size: int = 4, **settings: object) -> Scheduler:
    """A small one; settings of the policy and of the scheduler by name."""
    policy = {
        name: settings.pop(name)
        for name in ("token_budget", "prompt_fill", "max_sequences", "kind", "patience_steps", "max_waiting")
        if name in settings
    }
    policy.setdefault("token_budget", 16)
    settings.setdefault("max_model_len", 128)
    return Scheduler(SchedulePolicy(**policy), num_blocks, block_size, **settings)


class FakeEngine:
    """Runs plans on a cache of hashes, and chooses tokens at random.

    Args:
        scheduler: under test.
        seed: of the tokens, drafts, beams and ends.
        vocabulary: tokens; few make prefixes meet.
        draft_probability: that a sequence has drafts.
        stop_probability: that a sequence ends at a token.
        paced: forwards have random limits of prompt tokens beside decodes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        seed: int = 0,
        vocabulary: int = 3,
        draft_probability: float = 0.0,
        stop_probability: float = 0.0,
        paced: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.random = random.Random(seed)
        self.vocabulary = vocabulary
        self.draft_probability = draft_probability
        self.stop_probability = stop_probability
        self.paced = paced
        self.size = scheduler.tables.block_size
        self.device: list[list[object]] = [
            [None] * self.size for _ in range(scheduler.tables.device.num_blocks)
        ]
        self.host: list[list[object]] = [[None] * self.size for _ in range(scheduler.tables.host.num_blocks)]
        self.past: dict[Sequence, list[int]] = {}
        self.counts: Counter[str] = Counter()
        self.generation = 0
        self.steps = 0
        self.ended_at: dict[str, int] = {}

    # ---- one step ----------------------------------------------------------------------------------------------------

    def step(self, abort: str | None = None) -> StepPlan:
        """Plan, check, run, commit. `abort` goes away while the forward runs."""
        self.steps += 1
        plan = self.plan()
        self.check_plan(plan)
        self.copy(plan)
        for each in plan.scheduled:
            self.check_reads(each)
        for each in plan.scheduled:
            self.write(each)
        if abort is not None and self.scheduler.abort(abort):
            self.counts["aborted"] += 1
        self.advance(plan)
        for request in {id(each.sequence.request): each.sequence.request for each in plan.scheduled}.values():
            if request.finished:
                self.ended_at[request.id] = self.steps
                for sequence in request.sequences:
                    self.past.pop(sequence, None)
        return plan

    def plan(self) -> StepPlan:
        """The next, under a random limit if `paced`."""
        if not self.paced:
            return self.scheduler.schedule()
        limit = self.random.choice((None, 0, 0, 1, 2, 3, 5, 8))
        decoding = {each for each in self.past if each.status is Status.RUNNING and each.num_uncomputed == 1}
        plan = self.scheduler.schedule(limit)
        if limit is not None and any(each.sequence in decoding for each in plan.scheduled):
            whole = sum(each.num_tokens for each in plan.scheduled if each.num_tokens > 1)
            assert whole <= limit, "more of prompts beside decodes than may be"
            self.counts["limited"] += 0 < whole == limit
            self.counts["paused"] += limit == 0
        return plan

    def check_plan(self, plan: StepPlan) -> None:
        scheduler, budget = self.scheduler, self.scheduler.policy.token_budget
        alone = scheduler.policy.kind is Schedule.PREFILL_FIRST and len(plan.scheduled) == 1
        assert plan.num_tokens <= budget or (alone and not plan.scheduled[0].drafts), "over the budget"
        assert len(plan.scheduled) <= scheduler.max_sequences
        sequences = [each.sequence for each in plan.scheduled]
        assert len(set(sequences)) == len(sequences), "a sequence twice"
        assert not set(sequences) & set(plan.preempted)
        decodes = [each.num_tokens == 1 for each in plan.scheduled]
        first_chunk = decodes.index(False) if False in decodes else len(decodes)
        assert not any(each.drafts for each in plan.scheduled[first_chunk:]), "drafts in a chunk"
        for pairs in (plan.copies, plan.swap_in, plan.swap_out):
            assert len({to for _, to in pairs}) == len(pairs), "two copies to one block"
        assert not {to for _, to in plan.copies} & {to for _, to in plan.swap_in}
        assert not {host for _, host in plan.swap_out} & {host for host, _ in plan.swap_in}
        device = scheduler.tables.device
        for each in plan.scheduled:
            sequence, end = each.sequence, each.start + each.num_tokens
            assert sequence.status is Status.RUNNING
            assert each.start == sequence.num_computed, "positions are not contiguous"
            assert each.num_tokens >= 1
            assert end <= sequence.num_tokens
            assert each.wants_logits == (end == sequence.num_tokens)
            assert each.wants_logits or not each.drafts
            assert len(sequence.block_table) * self.size >= end + len(each.drafts)
            for block in sequence.block_table[
                each.start // self.size : -(-(end + len(each.drafts)) // self.size)
            ]:
                assert device.holders(block) == 1, "a shared block is written"
        for sequence in plan.preempted:
            assert sequence.status in (Status.WAITING, Status.SWAPPED)
            assert not sequence.block_table
        beams = Counter(each.sequence.request for each in plan.scheduled if each.wants_logits)
        for request, count in beams.items():
            if request.params.beam_width:
                live = sum(each.status is Status.RUNNING for each in request.sequences)
                assert count == live, "beams apart"
        self.counts["preempted"] += len(plan.preempted)
        self.counts["swapped out"] += len(plan.swap_out)
        self.counts["swapped in"] += len(plan.swap_in)
        self.counts["copied"] += len(plan.copies)
        self.counts["drafts"] += sum(len(each.drafts) for each in plan.scheduled)
        self.counts["chunks"] += len(decodes) - sum(decodes)
        self.counts["full"] += plan.num_tokens == budget

    def copy(self, plan: StepPlan) -> None:
        for source, target in plan.swap_out:
            self.host[target] = list(self.device[source])
        for source, target in plan.swap_in:
            self.device[target] = list(self.host[source])
        # At once, as one gather and scatter would; in order it must be the same.
        for (_, target), slots in zip(
            plan.copies, [list(self.device[f]) for f, _ in plan.copies], strict=True
        ):
            self.device[target] = slots

    def hashes(self, sequence: Sequence) -> list[int]:
        """What the slots of a sequence must hold."""
        past = self.past.setdefault(sequence, [])
        for token in sequence.token_ids[len(past) :]:
            request = sequence.request
            before = past[-1] if past else hash((request.adapter, request.cache_salt))
            past.append(hash((before, token)))
        return past

    def check_reads(self, each: Scheduled) -> None:
        expected, size, device = self.hashes(each.sequence), self.size, self.device
        for i, block in enumerate(each.sequence.block_table[: -(-each.start // size)]):
            wanted = expected[i * size : min((i + 1) * size, each.start)]
            assert device[block][: len(wanted)] == wanted, "a sequence would read what is not its own past"

    def write(self, each: Scheduled) -> None:
        hashes = self.hashes(each.sequence)[: each.start + each.num_tokens]
        for token in each.drafts:
            hashes = [*hashes, hash((hashes[-1], token))]
        for position in range(each.start, len(hashes)):
            block = each.sequence.block_table[position // self.size]
            self.device[block][position % self.size] = hashes[position]

    # ---- what the engine does with the tokens ------------------------------------------------------------------------

    def advance(self, plan: StepPlan) -> None:
        computed = []
        for each in plan.scheduled:
            accepted = self.random.randint(0, len(each.drafts))
            computed.append(each.num_tokens + accepted)
            if each.sequence.status is Status.RUNNING:
                each.sequence.token_ids += each.drafts[:accepted]
                self.counts["accepted"] += accepted
        self.scheduler.commit(plan, computed)
        chosen = [each.sequence for each in plan.scheduled if each.wants_logits]
        chosen = [each for each in chosen if each.status is Status.RUNNING]
        beams: dict[Request, list[Sequence]] = {}
        for sequence in chosen:
            if sequence.request.params.beam_width:
                beams.setdefault(sequence.request, []).append(sequence)
            else:
                self.extend(sequence)
        for request, group in beams.items():
            self.choose_beams(request, group)

    def extend(self, sequence: Sequence) -> None:
        request = sequence.request
        family = [sequence]
        if len(request.sequences) == 1 and request.params.num_sequences > 1:
            family += self.scheduler.fork(sequence, request.params.num_sequences - 1)
        for each in family:
            each.token_ids.append(self.random.randrange(self.vocabulary))
            self.end_or_draft(each)

    def choose_beams(self, request: Request, beams: list[Sequence]) -> None:
        width = request.params.beam_width
        children = Counter(self.random.choices(beams, k=width))
        if len(beams) < width and sum(each.status is Status.FINISHED for each in request.sequences) == 0:
            children = Counter({beams[0]: width})
        chosen: list[Sequence] = []
        for parent, count in children.items():
            forked = self.scheduler.fork(parent, count) if self.random.random() < 0.3 else None
            if forked is not None:  # the parent ends, and all go on as its children
                chosen += forked
                self.scheduler.drop(parent)
            else:
                chosen += [parent, *self.scheduler.fork(parent, count - 1)]
        for each in beams:
            if each not in children:
                self.scheduler.drop(each)
        for each in chosen:
            each.token_ids.append(self.random.randrange(self.vocabulary))
            self.end_or_draft(each, drafts=False)

    def end_or_draft(self, sequence: Sequence, drafts: bool = True) -> None:
        full = sequence.num_tokens >= self.scheduler.max_model_len
        if full or sequence.num_output_tokens >= sequence.request.params.max_tokens:
            self.scheduler.finish(sequence, FinishReason.LENGTH)
        elif self.random.random() < self.stop_probability:
            self.scheduler.finish(sequence, FinishReason.STOP)
        elif drafts and self.random.random() < self.draft_probability:
            sequence.drafts = [
                self.random.randrange(self.vocabulary) for _ in range(self.random.randint(1, 5))
            ]

    def run(self, most_steps: int = 100_000) -> list[StepPlan]:
        """Until nothing is left."""
        plans = []
        while self.scheduler.has_work:
            assert len(plans) < most_steps, "requests do not end"
            plans.append(self.step())
        self.check_empty()
        return plans

    def check_empty(self) -> None:
        """Nothing is held after the last request."""
        stats = self.scheduler.stats()
        assert (stats.waiting, stats.running, stats.swapped) == (0, 0, 0)
        assert (stats.blocks_used, stats.host_blocks_used) == (0, 0), "blocks leak"
        assert not self.scheduler.tables._holdings


def make_request(name: str, prompt: list[int] | int, *, max_tokens: int = 8, **settings: object) -> Request:
    """With a prompt, or with one of so many tokens that no other has."""
    if isinstance(prompt, int):
        prompt = [hash((name, i)) % 2**31 for i in range(prompt)]
    of_request = {key: settings.pop(key) for key in ("priority", "adapter", "cache_salt") if key in settings}
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **settings), **of_request)
