"""The engine: requests in, tokens out, one forward a step.

A step is: guess, schedule, run, choose, commit. No threads and no HTTP; `llm` and `serve` drive it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapters import Adapters
from .beams import BeamSearch
from .errors import RequestError
from .grammar import GrammarFactory
from .lines import Line
from .output import Output, Stats, TokenLogprobs
from .request import FinishReason, Request, SamplingParams, Sequence, Status
from .runner import Runner
from .sampler import Row, choose, logprobs_of
from .scheduler import Scheduler
from .step_plan import Scheduled, StepPlan
from .text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class _Job:
    """A request and what is kept of it.

    Attributes:
        seed: given, or drawn.
        beams: of a beam search.
        prompt_logprobs: of the prompt so far.
        ended: sequences that are held back until all have ended (`best_of`), with their last outputs.
    """

    request: Request
    seed: int
    beams: BeamSearch | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_told: bool = False
    ended: list[tuple[float, Line, FinishReason]] = field(default_factory=list)

    @property
    def holds_back(self) -> bool:
        """Which sequences are returned is known at the end only."""
        params = self.request.params
        return params.best_of is not None and params.best_of > params.n


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
        self._eos_ids = frozenset(eos_ids)
        self._grammars = GrammarFactory(tokenizer, vocab_size, eos_ids)
        self._adapters = adapters
        self._seeds = torch.Generator().manual_seed(seed)
        self._jobs: dict[str, _Job] = {}
        self._lines: dict[Sequence, Line] = {}
        self._generated = self._drafted = self._accepted = self._batch_tokens = 0

    # -- requests ---------------------------------------------------------------------------------------------

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
            first, TextStream(self.tokenizer, params.stop), grammar, self._eos_ids, longest
        )
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(2**62, (1,), generator=self._seeds))
        beams = BeamSearch(params.beam_width, params.length_penalty) if params.beam_width else None
        self._jobs[request_id] = _Job(request, seed, beams)

    def _check(self, prompt_ids: list[int], params: SamplingParams, adapter: str | None) -> None:
        wrong = next((token for token in prompt_ids if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise RequestError(f"prompt: expected token ids below {self._vocab_size}, got {wrong}")
        if params.beam_width and (
            params.stop or params.json_schema or params.regex or params.logprobs is not None
        ):
            raise RequestError(
                "beam_width: expected no stop text, schema, regex or logprobs beside it; use stop_token_ids, or sample"
            )
        known = () if self._adapters is None else self._adapters.names
        if adapter is not None and adapter not in known:
            raise RequestError(f"adapter: expected one of {sorted(known)}, got {adapter!r}; load it first")

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

    def embed(self, prompt_ids: list[int]) -> list[float]:
        """The last token's hidden state, of unit length."""
        self._check(prompt_ids, SamplingParams(), None)
        if not 0 < len(prompt_ids) <= self.max_model_len:
            raise RequestError(f"input: expected 1 to {self.max_model_len} tokens, got {len(prompt_ids)}")
        found: list[float] = self.runner.embed(prompt_ids).tolist()
        return found

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

    def step(self) -> list[Output]:
        """One forward; what it added to sequences, and which have ended."""
        self._guess()
        plan = self.scheduler.schedule()
        if not plan.scheduled:
            return []
        self._batch_tokens = plan.num_tokens
        logits_LV, batch = self.runner.run(plan)
        parts = [
            (part, rows)
            for part, rows in zip(plan.scheduled, logits_LV.split(batch.logits_counts), strict=True)
            if part.sequence.status is Status.RUNNING
        ]
        self._keep_prompt_logprobs(parts)
        return self._advance(plan, [(part, rows) for part, rows in parts if part.wants_logits])

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

    def _keep_prompt_logprobs(self, parts: list[tuple[Scheduled, Tensor]]) -> None:
        for part, rows_LV in parts:
            sequence, count = part.sequence, part.sequence.request.params.prompt_logprobs
            if count is None or part.start >= sequence.num_prompt_tokens:
                continue
            kept = self._jobs[sequence.request.id].prompt_logprobs
            if not kept:
                kept.append(TokenLogprobs(sequence.token_ids[0], None))
            for position in range(
                len(kept), min(part.start + part.num_tokens + 1, sequence.num_prompt_tokens)
            ):
                row = rows_LV[position - 1 - part.start]
                kept.append(logprobs_of(row, sequence.token_ids[position], count))

    def _advance(self, plan: StepPlan, parts: list[tuple[Scheduled, Tensor]]) -> list[Output]:
        """Choose tokens, append them, and tell the scheduler."""
        rows: list[Row] = []
        logits: list[Tensor] = []
        for part, rows_LV in parts:
            wanted = self._rows(part)
            rows += wanted
            logits.append(self._logits(part, rows_LV, len(wanted)))
        tokens = iter(choose(torch.cat(logits), rows) if logits else [])
        computed = {part.sequence: part.num_tokens for part in plan.scheduled}
        ends: list[tuple[Line, FinishReason | None]] = []
        forks: list[tuple[Sequence, list[int], Tensor]] = []
        beams: dict[str, list[tuple[Sequence, Tensor]]] = {}
        for part, rows_LV in parts:
            sequence, params = part.sequence, part.sequence.request.params
            last_LV = rows_LV[len(rows_LV) - 1 - len(part.drafts) :]
            if params.beam_width:
                beams.setdefault(sequence.request.id, []).append((sequence, last_LV[0]))
            elif self._is_first(sequence):
                forks.append((sequence, [next(tokens) for _ in range(params.num_sequences)], last_LV[0]))
            else:
                chosen = [next(tokens) for _ in range(1 + len(part.drafts))]
                accepted, reason = self._accept(sequence, part.drafts, chosen, last_LV)
                computed[sequence] += accepted
                ends.append((self._lines[sequence], reason))
        for sequence, chosen, logits_V in forks:
            ends.append((self._lines[sequence], self._push(sequence, chosen[0], logits_V)))
        self.scheduler.commit(plan, [computed[part.sequence] for part in plan.scheduled])
        for sequence, chosen, logits_V in forks:
            ends += self._fork(sequence, chosen, logits_V)
        outputs = [output for line, reason in ends for output in self._tell(line, reason)]
        for request_id, members in beams.items():
            outputs += self._search(self._jobs[request_id], members)
        return outputs

    def _is_first(self, sequence: Sequence) -> bool:
        """The prompt has been computed, and all sequences of the request go on from here."""
        request = sequence.request
        return sequence.num_output_tokens == 0 and request.params.num_sequences > 1

    def _rows(self, part: Scheduled) -> list[Row]:
        sequence, params = part.sequence, part.sequence.request.params
        if params.beam_width:
            return []
        line, seed = self._lines[sequence], self._jobs[sequence.request.id].seed
        indices = range(params.num_sequences) if self._is_first(sequence) else [sequence.index]
        allowed = None if line.grammar is None else line.grammar.allowed()
        return [
            Row(
                params,
                seed,
                index,
                [*sequence.token_ids, *part.drafts[:ahead]] if ahead else sequence.token_ids,
                sequence.num_prompt_tokens,
                sequence.num_output_tokens + ahead,
                line.banned if not ahead or params.min_tokens == 0 else self._banned(line, ahead),
                allowed,
            )
            for ahead in range(1 + len(part.drafts))
            for index in indices
        ]

    def _banned(self, line: Line, ahead: int) -> tuple[int, ...]:
        params = line.sequence.request.params
        free = line.sequence.num_output_tokens + ahead >= params.min_tokens
        return () if free else (*self._eos_ids, *params.stop_token_ids)

    def _logits(self, part: Scheduled, rows_LV: Tensor, count: int) -> Tensor:
        """The rows that tokens are chosen from; the first of a request with several sequences serves all."""
        last_LV = rows_LV[len(rows_LV) - 1 - len(part.drafts) :]
        if part.sequence.request.params.beam_width:
            return last_LV[:0]
        return last_LV.expand(count, -1) if self._is_first(part.sequence) else last_LV

    def _accept(
        self, sequence: Sequence, drafts: Items[int], chosen: list[int], rows_LV: Tensor
    ) -> tuple[int, FinishReason | None]:
        """Append what was chosen, as far as guesses were right; how many were, and why the sequence ends."""
        self._drafted += len(drafts)
        for at, token in enumerate(chosen):
            reason = self._push(sequence, token, rows_LV[at])
            right = at < len(drafts) and drafts[at] == token
            if reason is not None or not right:
                self._accepted += at + right
                return at + right, reason
        raise AssertionError("the last row follows every draft")

    def _push(self, sequence: Sequence, token: int, logits_V: Tensor) -> FinishReason | None:
        params, line = sequence.request.params, self._lines[sequence]
        logprobs = None
        if params.logprobs is not None or self._jobs[sequence.request.id].holds_back:
            logprobs = logprobs_of(logits_V, token, params.logprobs or 0)
            sequence.cumulative_logprob += logprobs.logprob or 0.0
        self._generated += 1
        return line.push(token, logprobs)

    def _fork(
        self, sequence: Sequence, chosen: list[int], logits_V: Tensor
    ) -> list[tuple[Line, FinishReason | None]]:
        """The other sequences of a request, each with a first token of its own."""
        first = self._lines[sequence]
        ends: list[tuple[Line, FinishReason | None]] = []
        for child, token in zip(self.scheduler.fork(sequence, len(chosen) - 1), chosen[1:], strict=True):
            child.token_ids = list(sequence.request.prompt_ids)
            child.cumulative_logprob = 0.0
            grammar = self._grammars.make(sequence.request.params)
            text = TextStream(self.tokenizer, sequence.request.params.stop)
            self._lines[child] = Line(child, text, grammar, self._eos_ids, first.longest)
            ends.append((self._lines[child], self._push(child, token, logits_V)))
        return ends

    def _search(self, job: _Job, members: list[tuple[Sequence, Tensor]]) -> list[Output]:
        """One step of a beam search."""
        assert job.beams is not None
        params, search = job.request.params, job.beams
        sequences = [sequence for sequence, _ in members]
        line = self._lines[sequences[0]]
        logprobs_BV = torch.stack([row for _, row in members]).log_softmax(-1)
        if line.banned:
            logprobs_BV[:, list(line.banned)] = -torch.inf
        values, ids = logprobs_BV.topk(min(2 * params.beam_width, self._vocab_size))
        outputs = [sequence.output_ids for sequence in sequences]
        scores = [sequence.cumulative_logprob for sequence in sequences]
        pairs = [
            list(zip(tokens, likely, strict=True))
            for tokens, likely in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        following = search.advance(outputs, scores, pairs, line.ends)
        self._generated += len(following)
        if not following:
            return self._end_search(job, sequences, [], [])
        children = self._grow(sequences, [beam.parent for beam in following])
        for child, beam in zip(children, following, strict=True):
            child.token_ids.append(beam.token_id)
            child.cumulative_logprob = beam.logprob
        if children[0].num_tokens >= line.longest:
            return self._end_search(
                job,
                children,
                [each.output_ids for each in children],
                [each.cumulative_logprob for each in children],
            )
        return []

    def _grow(self, sequences: list[Sequence], parents: list[int]) -> list[Sequence]:
        """A sequence for each parent named: itself, or a fork of it; those not named are dropped."""
        template = self._lines[sequences[0]]
        own = {at: [sequences[at]] for at in set(parents)}
        for at, made in own.items():
            if parents.count(at) > 1:
                made += self.scheduler.fork(sequences[at], parents.count(at) - 1)
        for at, sequence in enumerate(sequences):
            if at not in own:
                self.scheduler.drop(sequence)
                self._lines.pop(sequence, None)
        children = [own[at].pop() for at in parents]
        for child in children:
            if child not in self._lines:
                self._lines[child] = template.fork(child)
        return children

    def _end_search(
        self, job: _Job, running: list[Sequence], outputs: list[list[int]], scores: list[float]
    ) -> list[Output]:
        assert job.beams is not None
        for sequence in list(running):
            self.scheduler.finish(sequence, FinishReason.LENGTH)
        request = job.request
        found = []
        for index, each in enumerate(job.beams.best(request.params.n, outputs, scores)):
            text = self.tokenizer.decode(each.token_ids, skip_special_tokens=True)
            reason = FinishReason.STOP if each.ended else FinishReason.LENGTH
            found.append(
                Output(
                    request.id, index, each.token_ids, str(text), reason, len(request.prompt_ids),
                    request.num_cached_tokens, None, self._prompt_logprobs(job),
                )
            )  # fmt: skip
        self._jobs.pop(request.id, None)
        self._forget(request)
        return found

    # -- telling ----------------------------------------------------------------------------------------------

    def _tell(self, line: Line, reason: FinishReason | None) -> list[Output]:
        """What is new of a sequence; where it has ended, it is freed."""
        sequence = line.sequence
        job = self._jobs[sequence.request.id]
        if reason is not None:
            self.scheduler.finish(sequence, reason)
            self._lines.pop(sequence, None)
            if self.runner.guesser is not None:
                self.runner.guesser.forget(sequence)
        outputs: list[Output] = []
        if not job.holds_back:
            outputs = [line.tell(reason, self._prompt_logprobs(job))]
        elif reason is not None:
            job.ended.append((sequence.cumulative_logprob, line, reason))
        if reason is not None and not any(each.request is job.request for each in self._lines):
            outputs += self._tell_best(job)
            self._jobs.pop(sequence.request.id, None)
        return outputs

    def _tell_best(self, job: _Job) -> list[Output]:
        best = sorted(job.ended, key=lambda each: -each[0])[: job.request.params.n]
        outputs = []
        for index, (_, line, reason) in enumerate(best):
            line.sequence.index = index
            outputs.append(line.tell(reason, self._prompt_logprobs(job)))
        return outputs

    def _prompt_logprobs(self, job: _Job) -> list[TokenLogprobs] | None:
        """Once, with the first output."""
        if job.request.params.prompt_logprobs is None or job.prompt_told:
            return None
        job.prompt_told = True
        return job.prompt_logprobs

    def _forget(self, request: Request) -> None:
        for sequence in [each for each in self._lines if each.request is request]:
            del self._lines[sequence]
            if self.runner.guesser is not None:
                self.runner.guesser.forget(sequence)
