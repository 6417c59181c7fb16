"""The engine: requests in, tokens out, one forward a step.

A step is: guess, schedule, run, choose, commit. No threads and no HTTP; `llm` and `serve` drive it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapters import Adapters
from .beam_step import advance_beams
from .beams import BeamSearch
from .choices import begins_several, choose_tokens, first_row
from .errors import RequestError
from .grammar import GrammarFactory
from .jobs import Job
from .lines import Line
from .output import Output, Stats
from .pace import Pace
from .request import FinishReason, Request, SamplingParams, Sequence, Status
from .runner import Runner
from .sampler import logprobs_of
from .scheduler import Scheduler
from .step_plan import Scheduled, StepPlan
from .text import TextStream, decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Engine:
    """Serves requests with one model.

    Args:
        runner: the model and its cache.
        scheduler: of the same cache.
        tokenizer: the model's.
        eos_ids: tokens that end a sequence.
        model_name: what the model is called.
        seed: of requests without one of their own.
        adapters: LoRA adapters of the model; None where it takes none.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        model_name: str,
        seed: int = 0,
        adapters: Adapters | None = None,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.max_model_len = scheduler.max_model_len
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(token for token in eos_ids if token < vocab_size)
        self._grammars = GrammarFactory(tokenizer, vocab_size, eos_ids)
        self._adapters = adapters
        self._seeds = torch.Generator().manual_seed(seed)
        self._jobs: dict[str, Job] = {}
        self._lines: dict[Sequence, Line] = {}
        policy = scheduler.policy
        self._pace = Pace(policy.gap_s, policy.token_budget or 1) if policy.gap_s else None
        self._generated = self._drafted = self._accepted = self._batch_tokens = 0

    # -- requests ---------------------------------------------------------------------------------------------

    def is_prepared(self, params: SamplingParams) -> bool:
        """Whether `prepare` and `add` have no schema to compile; in any thread."""
        return self._grammars.is_made(params)

    def prepare(self, params: SamplingParams) -> None:
        """What `add` would take long for: compile a schema. In any thread, while others are served.

        Raises:
            RequestError: it is none.
        """
        self._grammars.make(params)

    def add(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request_id: a name of its own.
            prompt_ids: token ids.
            params: how tokens are chosen.
            priority: lower runs first.
            adapter: name of a LoRA adapter that has been loaded.

        Raises:
            RequestError: it can never run here.
            OverloadedError: the queue is full.
        """
        self._check(prompt_ids, params, adapter)
        request = Request(request_id, list(prompt_ids), params, priority, adapter=adapter)
        longest = min(len(prompt_ids) + params.max_tokens, self.max_model_len)
        request.cache_salt = str(self.runner.decoder.length_class(len(prompt_ids) + params.max_tokens))
        grammar = self._grammars.make(params)
        self.scheduler.add(request)
        first = request.sequences[0]
        self._lines[first] = Line(
            first,
            TextStream(self.tokenizer, params.stop, prompt_ids if params.continues else ()),
            grammar,
            self._eos_ids,
            longest,
        )
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(2**62, (1,), generator=self._seeds))
        beams = BeamSearch(params.beam_width, params.length_penalty) if params.beam_width else None
        self._jobs[request_id] = Job(request, seed, beams)

    def check(self, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None) -> None:
        """Refuse what `add` would refuse however empty the queue is.

        Raises:
            RequestError: it can never run here.
        """
        self._check(prompt_ids, params, adapter)
        self.scheduler.check(Request("", prompt_ids, params, adapter=adapter))
        self._grammars.make(params)

    def _check(self, prompt_ids: list[int], params: SamplingParams, adapter: str | None) -> None:
        given: list[tuple[str, Iterable[int]]] = [
            ("prompt", prompt_ids),
            ("logit_bias", params.logit_bias or ()),
            ("stop_token_ids", params.stop_token_ids),
        ]
        for name, token_ids in given:
            wrong = next((token for token in token_ids if not 0 <= token < self._vocab_size), None)
            if wrong is not None:
                raise RequestError(f"{name}: expected token ids below {self._vocab_size}, got {wrong}")
        if params.beam_width and (
            params.stop or params.json_schema or params.regex or params.logprobs is not None
        ):
            raise RequestError(
                "beam_width: expected no stop text, schema, regex or logprobs beside it; use stop_token_ids, or sample"
            )
        known = () if self._adapters is None else self._adapters.names
        if adapter is not None and adapter not in known:
            raise RequestError(f"adapter: expected one of {sorted(known)}, got {adapter!r}; load it first")

    def room(self, num_prompt_tokens: int, num_sequences: int) -> int:
        """See `Scheduler.room`; in any thread."""
        return self.scheduler.room(num_prompt_tokens, num_sequences)

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds; unknown ids are no error."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self.scheduler.abort(request_id)
            self._forget(job.request)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self.scheduler.has_work

    def load_adapter(self, name: str, directory: str) -> None:
        """Load a LoRA adapter that requests may choose by `name`.

        Raises:
            ModelError: it is none, or not of this model.
        """
        if self._adapters is None:
            raise RequestError(
                f"{self.model_name}: expected a model that takes adapters, got one that does not"
            )
        self._adapters.load(name, directory)

    def unload_adapter(self, name: str) -> None:
        """Forget a LoRA adapter that no request uses; its name may be given to another.

        Raises:
            RequestError: there is none of this name, or a request uses it.
        """
        if any(job.request.adapter == name for job in self._jobs.values()):
            raise RequestError(
                f"adapter {name!r}: expected no request that uses it; end or abort those first"
            )
        if self._adapters is None or name not in self._adapters.names:
            known = [] if self._adapters is None else sorted(self._adapters.names)
            raise RequestError(f"adapter: expected one of {known}, got {name!r}")
        self._adapters.unload(name)
        self.scheduler.forget_prefixes()  # what was computed under this name

    def embed(self, prompt_ids: list[int]) -> list[float] | None:
        """One forward of a text: the last token's hidden state, of unit length; None: call again with the same.

        A text has a cache of its own from its first forward to its last, and one text at a time has.

        Raises:
            RequestError: it is too long, or none.
            CacheError: there is no memory for it.
        """
        self._check(prompt_ids, SamplingParams(), None)
        if not 0 < len(prompt_ids) <= self.max_model_len:
            raise RequestError(f"input: expected 1 to {self.max_model_len} tokens, got {len(prompt_ids)}")
        found = self.runner.embed(prompt_ids, self.scheduler.policy.token_budget or 1)
        return None if found is None else found.tolist()

    def stats(self) -> Stats:
        """What it is busy with."""
        now = self.scheduler.stats()
        return Stats(
            waiting=now.waiting,
            running=now.running,
            swapped=now.swapped,
            blocks_used=now.blocks_used,
            blocks_total=now.blocks_total,
            batch_tokens=self._batch_tokens,
            preempted_total=now.preempted_total,
            prefix_hit_tokens_total=now.prefix_hit_tokens_total,
            prompt_tokens_total=now.prompt_tokens_total,
            generated_tokens_total=self._generated,
            drafted_tokens_total=self._drafted,
            accepted_tokens_total=self._accepted,
        )

    # -- a step -----------------------------------------------------------------------------------------------

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of prompts that the next forward may have beside decodes; None: as many as fit."""
        return None if self._pace is None else self._pace.prompt_tokens

    def step(self, prompt_tokens: int | None = None) -> list[Output]:
        """One forward; what it added to sequences, and which have ended.

        Args:
            prompt_tokens: that it may have beside decodes, where that was decided elsewhere; None: as the property.
        """
        begun = time.perf_counter()
        self._guess()
        plan = self.scheduler.schedule(self.prompt_tokens if prompt_tokens is None else prompt_tokens)
        if not plan.scheduled:
            return []
        outputs = self._run(plan)
        if self._pace is not None and plan.num_decodes:
            self._pace.took(plan.num_prompt_tokens, time.perf_counter() - begun)
        return outputs

    def _run(self, plan: StepPlan) -> list[Output]:
        self._batch_tokens = plan.num_tokens
        logits_LV, batch = self.runner.run(plan)
        stops = accumulate(batch.logits_counts)
        parts = [
            (part, range(stop - count, stop))
            for part, stop, count in zip(plan.scheduled, stops, batch.logits_counts, strict=True)
            if part.sequence.status is Status.RUNNING
        ]
        for part, rows in parts:
            self._jobs[part.sequence.request.id].keep_prompt_logprobs(part, logits_LV, rows)
        return self._advance(plan, logits_LV, [(part, rows) for part, rows in parts if part.wants_logits])

    def _guess(self) -> None:
        """Drafts for sequences that are about to take their last token."""
        guesser = self.runner.guesser
        if guesser is None:
            return
        ready = [
            line.sequence
            for line in self._lines.values()
            if line.sequence.status is Status.RUNNING
            and line.sequence.num_uncomputed == 1
            and line.sequence.num_output_tokens
            and line.grammar is None
            and not line.sequence.request.params.beam_width
        ]
        for sequence, drafts in zip(ready, guesser.guess(ready), strict=True):
            sequence.drafts = drafts

    def _advance(
        self, plan: StepPlan, logits_LV: Tensor, parts: list[tuple[Scheduled, range]]
    ) -> list[Output]:
        """Choose tokens, append them, and tell the scheduler."""
        tokens = choose_tokens(parts, logits_LV, self._lines, self._jobs)
        computed = {part.sequence: part.num_tokens for part in plan.scheduled}
        ends: list[tuple[Line, FinishReason | None]] = []
        forks: list[tuple[Sequence, list[int], int]] = []
        beams: dict[str, list[tuple[Sequence, Tensor]]] = {}
        for (part, rows), chosen in zip(parts, tokens, strict=True):
            sequence, first = part.sequence, first_row(part, rows)
            if sequence.request.params.beam_width:
                beams.setdefault(sequence.request.id, []).append((sequence, logits_LV[first]))
            elif begins_several(sequence):
                forks.append((sequence, chosen, first))
            else:
                accepted, reason = self._accept(sequence, part.drafts, chosen, logits_LV, first)
                computed[sequence] += accepted
                ends.append((self._lines[sequence], reason))
        self.scheduler.commit(plan, [computed[part.sequence] for part in plan.scheduled])
        for sequence, chosen, row in forks:
            lines = self._fork(sequence, len(chosen))
            ends += [
                (line, self._push(line, token, logits_LV, row))
                for line, token in zip(lines, chosen, strict=True)
            ]
        outputs = [output for line, reason in ends for output in self._tell(line, reason)]
        for request_id, members in beams.items():
            outputs += self._search(self._jobs[request_id], members)
        return outputs

    def _accept(
        self, sequence: Sequence, drafts: Items[int], chosen: list[int], logits_LV: Tensor, first: int
    ) -> tuple[int, FinishReason | None]:
        """Append what was chosen, as far as guesses were right; how many were, and why the sequence ends."""
        self._drafted += len(drafts)
        line = self._lines[sequence]
        for at, token in enumerate(chosen):
            reason = self._push(line, token, logits_LV, first + at)
            right = at < len(drafts) and drafts[at] == token
            if reason is not None or not right:
                self._accepted += at + right
                return at + right, reason
        raise AssertionError("the last row follows every draft")

    def _push(self, line: Line, token: int, logits_LV: Tensor, row: int) -> FinishReason | None:
        sequence, params = line.sequence, line.sequence.request.params
        logprobs = None
        if params.logprobs is not None or self._jobs[sequence.request.id].holds_back:
            logprobs = logprobs_of(logits_LV[row], token, params.logprobs or 0)
            sequence.cumulative_logprob += logprobs.logprob or 0.0
        self._generated += 1
        return line.push(token, logprobs)

    def _fork(self, sequence: Sequence, count: int) -> list[Line]:
        """So many lines that go on from the prompt, the sequence's own the first."""
        first = self._lines[sequence]
        children = self.scheduler.fork(sequence, count - 1)
        self._lines |= {child: first.fork(child) for child in children}
        return [first, *(self._lines[child] for child in children)]

    def _search(self, job: Job, members: list[tuple[Sequence, Tensor]]) -> list[Output]:
        """One step of a beam search."""
        line = self._lines[members[0][0]]
        going, outputs = advance_beams(job, line, members, self.scheduler, decoder_of(self.tokenizer))
        self._forget(job.request)
        self._generated += len(going)
        for sequence in going:
            self._lines[sequence] = line.fork(sequence)
        if not going:
            del self._jobs[job.request.id]
        return outputs

    # -- telling ----------------------------------------------------------------------------------------------

    def _tell(self, line: Line, reason: FinishReason | None) -> list[Output]:
        """What is new of a sequence; where it has ended, it is freed."""
        request = line.sequence.request
        job = self._jobs[request.id]
        if reason is None:
            return job.tell(line, None, is_last=False)
        self.scheduler.finish(line.sequence, reason)
        self._drop(line.sequence)
        if request.finished:
            del self._jobs[request.id]
        return job.tell(line, reason, is_last=request.finished)

    def _drop(self, sequence: Sequence) -> None:
        del self._lines[sequence]
        if self.runner.guesser is not None:
            self.runner.guesser.forget(sequence)

    def _forget(self, request: Request) -> None:
        for sequence in [each for each in self._lines if each.request is request]:
            self._drop(sequence)
