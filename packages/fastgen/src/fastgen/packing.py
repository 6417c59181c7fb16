"""PURE: how a forward is filled: Dynamic SplitFuse, or whole prompts first.

In: the groups that run and wait. Out: a `StepPlan`. Source: DeepSpeed-FastGen (Holmes et al. 2024, section 3.2): a
forward has a fixed number of tokens; every running sequence decodes in it, and prompts fill the rest, the last in part.
Here the number up to which prompts fill may be smaller than that up to which sequences decode.
Next: `scheduler`.
"""

from __future__ import annotations

from .admission import Admission, Forward
from .block_tables import BlockTables
from .config import Schedule
from .errors import FastgenError
from .groups import Group, Order
from .request import Sequence
from .step_plan import Scheduled, StepPlan


class Packer:
    """Fills forwards.

    Attributes:
        step: number of the last forward.
    """

    def __init__(
        self,
        kind: Schedule,
        *,
        budget: int,
        prompt_fill: int,
        max_model_len: int,
        tables: BlockTables,
        order: Order,
        admission: Admission,
    ) -> None:
        self._whole_prompts = kind is Schedule.PREFILL_FIRST
        self._budget = budget
        self._prompt_fill = prompt_fill
        self._max_model_len = max_model_len
        self._tables = tables
        self._order = order
        self._admission = admission
        self.step = 0

    def pack(self, prompt_tokens: int | None = None) -> StepPlan:
        """The next forward; beside decodes with at most so many tokens of prompts, where SplitFuse splits these."""
        self.step += 1
        forward = Forward(self.step, self._order, self._budget, self._admission.max_sequences)
        num_decodes, num_drafts, has_prompts = self._count()
        if self._whole_prompts:
            self._serve_all(forward, decodes=False, prompts=True)
            if not forward.chunks:
                forward.left = self._budget
                self._serve_all(forward, decodes=True, prompts=False)
                self._draft(forward, forward.left)
            return forward.finish()
        forward.set_aside = True
        forward.left -= num_decodes
        # Guesses do not keep prompts waiting: these get at least half of what decodes leave.
        num_drafts = min(num_drafts, forward.left // 2 if has_prompts else forward.left)
        forward.left -= num_drafts
        forward.prompts_left = most = max(self._prompt_fill - num_decodes, self._prompt_fill // 4, 1)
        if prompt_tokens is not None and num_decodes:
            forward.prompts_left = min(most, prompt_tokens)
        self._serve_all(forward, decodes=True, prompts=True)
        if prompt_tokens == 0 and not (
            forward.decodes or forward.chunks
        ):  # who would decode waits for memory
            forward.prompts_left = most
            self._serve_all(forward, decodes=False, prompts=True)
        self._draft(forward, num_drafts + forward.left)
        return forward.finish()

    def _count(self) -> tuple[int, int, bool]:
        """Sequences that decode, their drafts, and whether there are prompts to compute."""
        num_decodes = num_drafts = 0
        has_prompts = self._order.num_waiting > 0
        for group in self._order.running:
            if len(group.live) > group.most_live:
                raise FastgenError(
                    f"expected at most {group.most_live} sequences of request "
                    f"{group.request.id!r}, got {len(group.live)}; drop some before the next step"
                )
            for sequence in group.live:
                uncomputed = len(sequence.token_ids) - sequence.num_computed
                if uncomputed == 1:
                    num_decodes += 1
                    if sequence.drafts:
                        del sequence.drafts[self._num_drafts(sequence) :]
                        num_drafts += len(sequence.drafts)
                elif uncomputed > 1:
                    has_prompts = True
                else:
                    raise FastgenError(
                        f"expected a token to compute, got none for sequence {sequence.index} of request "
                        f"{group.request.id!r}; append the token that was chosen, or finish it"
                    )
        return num_decodes, num_drafts, has_prompts

    def _serve_all(self, forward: Forward, *, decodes: bool, prompts: bool) -> None:
        """Serve groups from the best to the worst; with `prompts` those that wait begin in their turn."""
        running = self._order.running
        admits = prompts
        at = 0
        while True:
            group = running[at] if at < len(running) else None
            if admits:
                waiting = self._order.best_waiting()
                if waiting is not None and (group is None or waiting.key < group.key):
                    if min(forward.left, forward.prompts_left) > 0 and self._admission.admit(
                        forward, waiting
                    ):
                        group = waiting
                    else:
                        admits = False  # nobody overtakes it
                        continue
            if group is None:
                return
            is_set_aside = forward.set_aside and group.moved_step != forward.step
            if len(group.live) > 1 and group.request.params.beam_width:
                if is_set_aside:
                    forward.left += sum(each.num_uncomputed == 1 for each in group.live)
                self._serve_beams(forward, group, decodes=decodes, prompts=prompts)
            else:
                for sequence in group.live:
                    if len(sequence.token_ids) - sequence.num_computed == 1:
                        forward.left += is_set_aside
                        if decodes and forward.left > 0:
                            self._decode(forward, group, sequence)
                    elif prompts and min(forward.left, forward.prompts_left) > 0:
                        self._admission.skip(sequence)
                        self._chunk(forward, group, sequence)
            at += 1

    def _serve_beams(self, forward: Forward, group: Group, *, decodes: bool, prompts: bool) -> None:
        """All beams take their last token in the same forward, since the next ones are chosen among all."""
        for sequence in group.live:
            if prompts and not sequence.block_table:
                self._admission.begin_sibling(forward, group, sequence)
            if prompts and sequence.num_uncomputed > 1:
                self._admission.skip(sequence)
        if all(sequence.num_uncomputed == 1 for sequence in group.live):
            if decodes and forward.left >= len(group.live):
                missing = self._tables.missing_together(group.live)
                if self._admission.make_room(forward, group, missing):
                    for sequence in group.live:
                        self._decode(forward, group, sequence)
        elif prompts:
            for sequence in group.live:
                room = min(forward.left, forward.prompts_left)
                if sequence.num_uncomputed > 1 and sequence.block_table and room > 0:
                    self._chunk(forward, group, sequence, held_back=1)

    def _decode(self, forward: Forward, group: Group, sequence: Sequence) -> None:
        """The sequence's last token."""
        start = sequence.num_computed
        if self._extend(forward, group, sequence, start + 1):
            forward.left -= 1
            forward.decodes.append(Scheduled(sequence, start, 1))

    def _chunk(self, forward: Forward, group: Group, sequence: Sequence, held_back: int = 0) -> None:
        """As many of the sequence's tokens, but for the last ones, as there is room for."""
        if not sequence.block_table and not self._admission.begin_sibling(forward, group, sequence):
            return
        start, uncomputed = sequence.num_computed, sequence.num_uncomputed - held_back
        count = min(uncomputed, forward.left, forward.prompts_left)
        is_scored = group.request.params.prompt_logprobs is not None and start < sequence.num_prompt_tokens
        if self._whole_prompts:
            if count < uncomputed and forward.chunks:
                forward.left = 0  # nobody overtakes it
                return
            count = uncomputed
        elif is_scored:  # each of its tokens has a row of logits, for which there is memory
            count = min(count, forward.scored_left)
            if count < 1:
                return
        if not self._extend(forward, group, sequence, start + count):
            return
        wants_logits = count == sequence.num_uncomputed
        forward.chunks.append(Scheduled(sequence, start, count, wants_logits=wants_logits))
        forward.left = max(0, forward.left - count)
        forward.prompts_left -= count
        forward.scored_left -= is_scored * count

    def _extend(self, forward: Forward, group: Group, sequence: Sequence, end: int) -> bool:
        """Make a sequence's next positions its own, if need be at the cost of worse groups."""
        if not self._tables.is_writable(sequence, end):
            missing = self._tables.missing(sequence, end)
            if not self._admission.make_room(forward, group, missing):
                return False
            forward.plan.copies.extend(self._tables.extend(sequence, end))
        return True

    def _draft(self, forward: Forward, num_drafts: int) -> None:
        """Add at most so many drafts to decodes, where blocks are available without taking anyone's."""
        tables = self._tables
        for i, each in enumerate(forward.decodes):
            sequence = each.sequence
            if not sequence.drafts:
                continue
            room = (len(sequence.block_table) + tables.device.num_available) * tables.block_size
            count = max(0, min(len(sequence.drafts), num_drafts, room - each.start - 1))
            if count:
                tables.extend(sequence, each.start + 1 + count)
                forward.decodes[i] = Scheduled(sequence, each.start, 1, tuple(sequence.drafts[:count]))
                num_drafts -= count
            sequence.drafts = []

    def _num_drafts(self, sequence: Sequence) -> int:
        """Drafts that could all become output, with the token that follows them."""
        longest = min(sequence.num_prompt_tokens + sequence.request.params.max_tokens, self._max_model_len)
        return max(0, longest - sequence.num_tokens - 1)
