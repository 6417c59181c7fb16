"""PURE: who may run: waiting groups begin, and worse ones give way where blocks or places are few.

In: a forward that is being filled, and a group that wants blocks. Out: yes or no, and the groups moved accordingly.
Next: `packing`.

Note [Who gives way]
Groups are served in their order (Note [One order]), and only worse ones are sent away for a better one: what has been
put into this forward stays there. A group that has moved in this step moves no more in it. Since nobody is overtaken,
all that run are better than those that were sent away; so in a step in which one of these comes back, nobody is sent
away after it, and its blocks in host memory are read before they are written again.
"""

from __future__ import annotations

import sys
from collections import Counter

from .block_tables import BlockTables
from .groups import Group, Order
from .request import Sequence, Status
from .step_plan import Scheduled, StepPlan


class Forward:
    """A forward while it is filled.

    Args:
        step: its number.
        order: the groups at its beginning.
        left: tokens that are free.
        scored_left: rows of logits for tokens of prompts, where requests ask for their log-probabilities.

    Attributes:
        plan: what is copied, and who was sent away.
        decodes: sequences with their last token.
        chunks: parts of prompts.
        prompts_left: of `left`, what prompts may have.
        set_aside: tokens of `left` were set aside for the next token of each group that runs.
        num_slots: places that running groups take.
        num_live: their sequences.
    """

    def __init__(self, step: int, order: Order, left: int, scored_left: int) -> None:
        self.step = step
        self.left = left
        self.scored_left = scored_left
        self.prompts_left = sys.maxsize
        self.set_aside = False
        self.plan = StepPlan()
        self.decodes: list[Scheduled] = []
        self.chunks: list[Scheduled] = []
        self.num_slots = sum(group.num_slots for group in order.running)
        self.num_live = sum(len(group.live) for group in order.running)

    def finish(self) -> StepPlan:
        """The plan, filled."""
        self.plan.scheduled.extend(self.decodes)
        self.plan.scheduled.extend(self.chunks)
        return self.plan


class Admission:
    """Moves groups between waiting and running.

    Attributes:
        max_sequences: places.
        num_preempted: times that a sequence lost its blocks.
        num_prompt_tokens: of requests that were begun.
        num_hit_tokens: of them, those that the prefix cache had.
    """

    def __init__(self, max_sequences: int, tables: BlockTables, order: Order) -> None:
        self.max_sequences = max_sequences
        self._tables = tables
        self._order = order
        self.num_preempted = 0
        self.num_prompt_tokens = 0
        self.num_hit_tokens = 0

    def make_room(self, forward: Forward, group: Group, num_blocks: int) -> bool:
        """Send worse groups away until so many blocks are available."""
        while self._tables.device.num_available < num_blocks:
            if not self._may_preempt(forward, group):
                return False
            self._preempt(forward)
        return True

    def begin_sibling(self, forward: Forward, group: Group, sequence: Sequence) -> bool:
        """Give blocks to a sequence whose group was preempted, once another of the group has computed the prompt."""
        shared = sequence.num_prompt_tokens // self._tables.block_size * self._tables.block_size
        started = [each for each in group.live if each.block_table]
        donor = next((each for each in started if each.num_computed >= shared), None)
        if donor is None and started:
            return False  # it is still at the prompt
        if not self.make_room(forward, group, self._tables.begin_cost(sequence, donor)):
            return False
        self._tables.begin(sequence, donor)
        return True

    def skip(self, sequence: Sequence) -> None:
        """Go past what another sequence has computed since this one began."""
        if sequence.block_table:
            self._count_hits(sequence, self._tables.skip(sequence))

    def admit(self, forward: Forward, group: Group) -> bool:
        """Begin the best group that waits, if there is room, or will be when worse ones have given way."""
        if group.moved_step == forward.step or not self._find_room(forward, group):
            return False
        if group.status is Status.SWAPPED:
            forward.plan.swap_in.extend(self._tables.swap_in(group.live))
        else:
            self._count_hits(group.live[0], self._tables.begin(group.live[0]))
            if group.moved_step < 0:
                self.num_prompt_tokens += group.live[0].num_prompt_tokens
        self._order.begin(group)
        group.status = Status.RUNNING
        group.moved_step = forward.step
        for sequence in group.live:
            sequence.status = Status.RUNNING
        forward.num_slots += group.num_slots
        forward.num_live += len(group.live)
        return True

    def _count_hits(self, sequence: Sequence, num_tokens: int) -> None:
        """Tokens of a prompt were found; when it is computed again they count no more."""
        if sequence.num_output_tokens == 0 and not sequence.request.preempted:
            sequence.request.num_cached_tokens += num_tokens
            self.num_hit_tokens += num_tokens

    def _find_room(self, forward: Forward, group: Group) -> bool:
        """There are places and blocks for a group; worse groups are sent away for it only if that is enough."""
        tables, running = self._tables, self._order.running
        worse = running and running[-1].key > group.key
        if forward.num_slots + group.num_slots > self.max_sequences and not worse:
            return False
        cost = self._cost(group)
        if worse:
            behind = [each for each in running if each.key > group.key]
            slots = forward.num_slots - sum(each.num_slots for each in behind)
            live = forward.num_live - sum(len(each.live) for each in behind)
            missing = cost + live - tables.device.num_available
            if slots + group.num_slots > self.max_sequences or (
                missing > 0 and missing > self._freed(behind)
            ):
                return False
        while True:
            # A block for each that runs, so that their next tokens do not send this group away again.
            if (
                cost + forward.num_live <= tables.device.num_available
                and forward.num_slots + group.num_slots <= self.max_sequences
            ):
                return True
            if not self._may_preempt(forward, group):
                return False
            self._preempt(forward)
            cost = self._cost(group)

    def _freed(self, groups: list[Group]) -> int:
        """Blocks that nobody holds any more when these groups have none."""
        held = Counter(block for group in groups for one in group.live for block in one.block_table)
        return sum(count == self._tables.device.holders(block) for block, count in held.items())

    def _cost(self, group: Group) -> int:
        """Available blocks that a group needs to begin."""
        tables = self._tables
        if group.status is Status.SWAPPED:
            return tables.swap_in_cost(group.live)
        first = group.live[0]
        shared = first.num_prompt_tokens // tables.block_size
        own = sum(tables.count(sequence.num_tokens) - shared for sequence in group.live[1:])
        return tables.begin_cost(first) + own

    def _may_preempt(self, forward: Forward, group: Group) -> bool:
        """The worst that runs is worse than this group, and has not come in this step."""
        running = self._order.running
        return bool(running) and running[-1].key > group.key and running[-1].moved_step != forward.step

    def _preempt(self, forward: Forward) -> None:
        """The worst that runs loses its blocks: to host memory where there is room, else to be computed again."""
        group = self._order.stop_worst()
        group.request.preempted = True
        forward.num_slots -= group.num_slots
        forward.num_live -= len(group.live)
        if forward.set_aside:
            forward.left += sum(sequence.num_uncomputed == 1 for sequence in group.live)
        moved = self._tables.swap_out(group.live)
        group.status = Status.WAITING if moved is None else Status.SWAPPED
        for sequence in group.live:
            if moved is None:
                self._tables.release(sequence)
            sequence.status = group.status
            sequence.drafts = []
        group.moved_step = forward.step
        self._order.wait(group)
        self.num_preempted += len(group.live)
        forward.plan.swap_out.extend(moved or ())
        forward.plan.preempted.extend(group.live)
