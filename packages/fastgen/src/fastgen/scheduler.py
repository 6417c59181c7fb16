"""PURE: which sequences take part in the next forward, with how many tokens, and who gives way when blocks are few.

In: requests, and after each forward what has been computed. Out: a `StepPlan`. Next: `batch` makes tensors of it, and
the engine answers with `commit`, `fork` and `finish`. How a forward is filled is in `packing`.

Note [No deadlock]
A request is only taken if it can have all its blocks when it is alone (`Scheduler.add`). The best that runs can send
away all others, so it always goes on, and ends; then the next is the best. Nobody else is ever needed for that: one
who gets no block just waits, keeping its own, unless a better one takes them.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from .admission import Admission
from .block_tables import BlockTables
from .config import SchedulePolicy
from .errors import ConfigError, FastgenError, OverloadedError, RequestError
from .groups import Group, Order, place
from .packing import Packer
from .request import FinishReason, Request, Sequence, Status
from .step_plan import StepPlan


@dataclass(frozen=True)
class SchedulerStats:
    """How busy it is; sequences, blocks, and counts from the start.

    Attributes:
        waiting: sequences that have no blocks.
        running: sequences that take part in forwards.
        swapped: sequences whose blocks are in host memory.
        blocks_used: cache blocks that sequences hold.
        blocks_total: cache blocks that there are.
        host_blocks_used: the same of host memory.
        preempted_total: times that a sequence lost its blocks.
        prompt_tokens_total: prompt tokens of requests that were begun.
        prefix_hit_tokens_total: of them, those that the prefix cache had.
    """

    waiting: int
    running: int
    swapped: int
    blocks_used: int
    blocks_total: int
    host_blocks_used: int
    preempted_total: int
    prompt_tokens_total: int
    prefix_hit_tokens_total: int


class Scheduler:
    """Plans forwards.

    A step of an engine: `plan = schedule()`; run it; append the tokens chosen (after accepted drafts) to the sequences;
    `commit(plan, computed)`; then `fork`, `finish` and `drop` as the tokens demand. `add` and `abort` may come at any
    time between these calls.

    Args:
        policy: with a `token_budget`.
        num_blocks: of the cache.
        block_size: tokens in a block.
        prefix: keep computed blocks for prompts that begin alike.
        num_host_blocks: of host memory, for sequences that lose theirs.
        max_model_len: most tokens of a sequence.
    """

    def __init__(
        self,
        policy: SchedulePolicy,
        num_blocks: int,
        block_size: int,
        *,
        max_model_len: int,
        prefix: bool = True,
        num_host_blocks: int = 0,
    ) -> None:
        if policy.token_budget is None:
            raise ConfigError(
                "SchedulePolicy(token_budget=...): expected a number, got None; measure it first"
            )
        self.policy = policy
        self.max_model_len = max_model_len
        self.tables = BlockTables(num_blocks, block_size, prefix=prefix, num_host_blocks=num_host_blocks)
        # One token of a forward is left for prompts, so that one always gets on.
        self.max_sequences = min(policy.max_sequences, max(1, policy.token_budget - 1))
        self._order = Order()
        self._admission = Admission(self.max_sequences, self.tables, self._order)
        self._packer = Packer(
            policy.kind,
            budget=policy.token_budget,
            prompt_fill=policy.prompt_fill or policy.token_budget,
            max_model_len=max_model_len,
            tables=self.tables,
            order=self._order,
            admission=self._admission,
        )
        self._groups: dict[str, Group] = {}
        self._num_arrived = 0

    def add(self, request: Request) -> None:
        """Take a request into the queue, with the next number of arrival.

        Raises:
            RequestError: its id is in use, its prompt is empty or too long, or it could never have all its blocks.
            OverloadedError: the queue is full.
        """
        self.check(request)
        if self.is_full:
            raise OverloadedError(
                f"expected fewer than {self.policy.max_waiting} requests in the queue, got "
                f"{self._order.num_waiting}; try again later"
            )
        request.arrival = self._num_arrived
        self._num_arrived += 1
        key = place(request.priority, self.policy.patience_steps, self._packer.step, request.arrival)
        group = self._groups[request.id] = Group(request, key, list(request.sequences))
        self._order.wait(group)

    def room(self, num_prompt_tokens: int, num_sequences: int) -> int:
        """Tokens that each of so many sequences may add to such a prompt; 0: `add` would refuse any such request.

        The same at any time, and in any thread.
        """
        if num_prompt_tokens == 0 or num_sequences > self.max_sequences:
            return 0
        shared = num_prompt_tokens // self.tables.block_size
        blocks = shared + (self.tables.device.num_blocks - shared) // num_sequences
        longest = min(blocks * self.tables.block_size, self.max_model_len)
        return max(0, longest - num_prompt_tokens)

    def abort(self, request_id: str) -> bool:
        """End a request, wherever it is, and free its blocks. False if there is none of this id (any more)."""
        group = self._groups.get(request_id)
        if group is None:
            return False
        for sequence in list(group.live):
            self.finish(sequence, FinishReason.ABORT)
        return True

    @property
    def is_full(self) -> bool:
        """Whether the queue takes no more requests now."""
        return self._order.num_waiting >= self.policy.max_waiting

    @property
    def has_work(self) -> bool:
        """There are requests; `schedule` will find something to do."""
        return bool(self._groups)

    def schedule(self, prompt_tokens: int | None = None) -> StepPlan:
        """The next forward; empty only without requests.

        Args:
            prompt_tokens: beside decodes, at most so many tokens of prompts; None: as the budget allows.

        Raises:
            FastgenError: sequences were not advanced as they must be.
        """
        plan = self._packer.pack(prompt_tokens)
        if self._groups and not plan.scheduled:
            raise FastgenError(
                f"expected a sequence that can go on, got none of {len(self._groups)} requests; finish sequences of "
                f"{self.max_model_len} tokens, and those with max_tokens"
            )
        return plan

    def commit(self, plan: StepPlan, computed: Items[int]) -> None:
        """The forward is done, and its tokens have been appended to the sequences.

        Args:
            plan: from `schedule`.
            computed: for each of `plan.scheduled` how many of its tokens are in the cache for good: `num_tokens`, and
                the drafts that were accepted (which by now are the sequence's tokens).

        Raises:
            FastgenError: more are computed than were scheduled, or than the sequence has.
        """
        for each, count in zip(plan.scheduled, computed, strict=True):
            sequence = each.sequence
            if sequence.status is not Status.RUNNING:  # it was aborted meanwhile
                continue
            end = each.start + count
            if not 0 <= count <= each.num_tokens + len(each.drafts) or end > sequence.num_tokens:
                raise FastgenError(
                    f"expected at most {each.num_tokens} computed tokens and {len(each.drafts)} drafts, appended to "
                    f"the sequence's {sequence.num_tokens} tokens, got {count} from {each.start} (request "
                    f"{sequence.request.id!r}, sequence {sequence.index})"
                )
            self.tables.computed(sequence, end)

    def fork(self, sequence: Sequence, count: int = 1) -> list[Sequence]:
        """So many more sequences of the request that go on from this one; they share its blocks.

        Call it after `commit`. Until the next `schedule` a request may have more than its `num_sequences`.
        """
        if sequence.status is not Status.RUNNING:
            raise FastgenError(
                f"expected a running sequence to fork, got one that is {sequence.status.value}"
            )
        request = sequence.request
        group = self._groups[request.id]
        children = []
        for index in range(group.num_forked, group.num_forked + count):
            child = Sequence(request, index, list(sequence.token_ids), sequence.num_prompt_tokens)
            child.status = Status.RUNNING
            child.cumulative_logprob = sequence.cumulative_logprob
            self.tables.fork(sequence, child)
            children.append(child)
        group.fork(children)
        return children

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, which stays among its request's; the last one ends the request. Call it after `commit`."""
        if sequence.status is Status.FINISHED:
            return
        group = self._groups[sequence.request.id]
        self.tables.release(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.drafts = []
        group.end(sequence)
        if not group.live:
            self._order.end(group)
            del self._groups[group.request.id]

    def drop(self, sequence: Sequence) -> None:
        """A beam that is cut: end it, and take it from its request's sequences. Fork those that stay before."""
        self.finish(sequence, FinishReason.ABORT)
        sequence.request.sequences.remove(sequence)

    def forget_prefixes(self) -> None:
        """What is computed from now on is another model's (new weights): requests find nothing of what was before."""
        self.tables.forget()

    def stats(self) -> SchedulerStats:
        """How busy it is."""
        waiting = [group.status for group in self._order.waiting() for _ in group.live]
        return SchedulerStats(
            waiting=waiting.count(Status.WAITING),
            running=sum(len(group.live) for group in self._order.running),
            swapped=waiting.count(Status.SWAPPED),
            blocks_used=self.tables.device.num_used,
            blocks_total=self.tables.device.num_blocks,
            host_blocks_used=self.tables.host.num_used,
            preempted_total=self._admission.num_preempted,
            prompt_tokens_total=self._admission.num_prompt_tokens,
            prefix_hit_tokens_total=self._admission.num_hit_tokens,
        )

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            RequestError: see `add`.
        """
        prompt, params = len(request.prompt_ids), request.params
        if request.id in self._groups:
            raise RequestError(f"expected a new request id, got {request.id!r}, which is in use")
        if prompt == 0:
            raise RequestError("expected a prompt of at least one token, got none")
        if prompt >= self.max_model_len:
            raise RequestError(
                f"expected a prompt shorter than the model's {self.max_model_len} tokens, got {prompt}; shorten it"
            )
        if params.num_sequences > self.max_sequences:
            raise RequestError(
                f"expected at most {self.max_sequences} sequences (n, best_of, beam_width) in a request, got "
                f"{params.num_sequences}; ask for fewer, or raise max_sequences and token_budget"
            )
        longest = min(prompt + params.max_tokens, self.max_model_len)
        shared = prompt // self.tables.block_size
        blocks = shared + params.num_sequences * (self.tables.count(longest) - shared)
        if blocks > self.tables.device.num_blocks:
            raise RequestError(
                f"expected a request that fits the KV cache, which has {self.tables.device.num_blocks} blocks of "
                f"{self.tables.block_size} tokens, got one that may need {blocks}: a prompt of {prompt} tokens and "
                f"max_tokens={params.max_tokens}, {params.num_sequences} times; ask for less, or give the cache more"
            )
