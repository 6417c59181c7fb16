"""An engine without a model: says words, one token a step, and keeps account of blocks as a real one does."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastgen.errors import OverloadedError, RequestError
from fastgen.output import Output, Stats, TokenLogprobs
from fastgen.request import FinishReason, SamplingParams
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "in", "Zürich", "and", "東京"]
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.content == 'refuse' %}{{ raise_exception('no such talk') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ mood or '' }}"
)
SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
BLOCK_SIZE = 16


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Spaces are U+2581, unknown characters fall back to bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "c", "\u2581a", "ab"]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [("\u2581", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def tiny_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    wrapped.chat_template = chat_template
    return wrapped


@dataclass
class Line:
    """One sequence: the tokens it is going to say."""

    index: int
    to_say: list[int]
    raw: bytes
    num_said: int = 0
    shown: int = 0
    done: bool = False


@dataclass
class Running:
    """One request."""

    name: str
    prompt_ids: list[int]
    params: SamplingParams
    lines: list[Line]
    begun: bool = False
    blocks: int = field(default=0)


class FakeEngine:
    """Implements what `fastgen.serve.loop.Engine` asks for.

    `reply(prompt_text, params, index)` says what is answered; `step_s` is how long a step takes.
    """

    def __init__(
        self,
        *,
        step_s: float = 0.0,
        max_model_len: int = 2048,
        max_waiting: int = 10_000,
        reply: Callable[[str, SamplingParams, int], str] | None = None,
        chat_template: str | None = TEMPLATE,
    ) -> None:
        self.model_name = "tiny"
        self.max_model_len = max_model_len
        self.tokenizer = tiny_tokenizer(chat_template)
        self.adapters = {"pirate"}
        self.requests: dict[str, Running] = {}
        self.seen: list[dict[str, Any]] = []
        self.prepared: list[tuple[str | None, str]] = []
        self.step_s = step_s
        self.embed_forwards = 1
        self.did: list[str] = []
        self.fail_next: Exception | None = None
        self.num_failures = 10**9
        self.num_aborted = 0
        self._max_waiting = max_waiting
        self._reply = reply or default_reply
        self._totals = dict.fromkeys(
            ["prompt_tokens_total", "generated_tokens_total", "prefix_hit_tokens_total", "preempted_total"], 0
        )
        self._batch_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def room(self, num_prompt_tokens: int, num_sequences: int) -> int:
        return max(0, self.max_model_len - num_prompt_tokens)

    def is_prepared(self, params: SamplingParams) -> bool:
        """No schema is kept."""
        return params.json_schema is None and params.regex is None

    def prepare(self, params: SamplingParams) -> None:
        self.prepared.append((params.json_schema, threading.current_thread().name))

    def add(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> None:
        assert request_id not in self.requests
        if max(prompt_ids) >= len(self.tokenizer):
            raise RequestError(f"expected token ids below {len(self.tokenizer)}, got {max(prompt_ids)}")
        if len(prompt_ids) + params.max_tokens > self.max_model_len:
            raise RequestError(f"expected at most {self.max_model_len} tokens, got more")
        if params.json_schema is not None and json.loads(params.json_schema).get("type") == "bogus":
            raise RequestError("expected a JSON schema, got type 'bogus'")
        if len(self.requests) >= self._max_waiting:
            raise OverloadedError("the queue is full")
        self.seen.append(
            {"params": params, "priority": priority, "adapter": adapter, "prompt_ids": prompt_ids}
        )
        text = self.tokenizer.decode(prompt_ids, skip_special_tokens=False)
        lines = []
        for index in range(params.n):
            said = self._reply(text, params, index)
            ids = self.tokenizer.encode(said, add_special_tokens=False)
            raw = said.encode()
            if params.ignore_eos:
                times = params.max_tokens // len(ids) + 1
                ids, raw = ids * times, raw * times
            lines.append(Line(index, ids, raw))
        self.requests[request_id] = Running(request_id, prompt_ids, params, lines)
        self._totals["prompt_tokens_total"] += len(prompt_ids)

    def abort(self, request_id: str) -> None:
        self.num_aborted += self.requests.pop(request_id, None) is not None

    def step(self, prompt_tokens: int | None = None) -> list[Output]:
        if self.fail_next is not None and self.num_failures:
            self.num_failures -= 1
            raise self.fail_next
        if self.step_s:
            time.sleep(self.step_s)
        self.did.append("step")
        outputs = []
        self._batch_tokens = 0
        for running in list(self.requests.values()):
            self._batch_tokens += len(running.prompt_ids) if not running.begun else 0
            for line in running.lines:
                if not line.done:
                    outputs.append(self._advance(running, line))
                    self._batch_tokens += 1
                    running.begun = True
            running.blocks = math.ceil((len(running.prompt_ids) + running.lines[0].num_said) / BLOCK_SIZE)
            if all(line.done for line in running.lines):
                del self.requests[running.name]
        return outputs

    def stats(self) -> Stats:
        waiting = sum(not running.begun for running in self.requests.values())
        return Stats(
            waiting=waiting,
            running=len(self.requests) - waiting,
            blocks_used=sum(running.blocks for running in self.requests.values()),
            blocks_total=4096,
            batch_tokens=self._batch_tokens,
            **self._totals,
        )

    def embed(self, prompt_ids: list[int]) -> list[float] | None:
        if max(prompt_ids) >= len(self.tokenizer):
            raise RequestError("expected known token ids")
        self.did.append("embed")
        if self.did.count("embed") % self.embed_forwards:
            return None
        return [float(len(prompt_ids)), 0.5, -1.25]

    def _advance(self, running: Running, line: Line) -> Output:
        params, first = running.params, not running.begun and line.index == 0
        token_id = line.to_say[line.num_said] if line.num_said < len(line.to_say) else 0
        line.num_said += 1
        self._totals["generated_tokens_total"] += 1
        text = line.raw[: line.num_said].decode(errors="ignore")  # a byte a token: quicker than the tokenizer
        finish = None
        for stop in params.stop:
            if stop in text:
                text, finish = text[: text.index(stop)], FinishReason.STOP
        if finish is None and line.num_said >= params.max_tokens:
            finish = FinishReason.LENGTH
        elif finish is None and line.num_said >= len(line.to_say):
            finish = FinishReason.STOP
        if finish is None:
            for stop in params.stop:
                for length in range(len(stop), 0, -1):
                    text = text[:-length] if text.endswith(stop[:length]) else text
        new, line.shown = text[line.shown :], max(line.shown, len(text))
        line.done = finish is not None
        wants = params.logprobs
        return Output(
            request_id=running.name,
            index=line.index,
            new_token_ids=[token_id],
            text=new,
            finish_reason=finish,
            num_prompt_tokens=len(running.prompt_ids),
            logprobs=None if wants is None else [scored(token_id, wants)],
            prompt_logprobs=None
            if params.prompt_logprobs is None or not first
            else [
                TokenLogprobs(running.prompt_ids[0], None),
                *(scored(t, wants or 0) for t in running.prompt_ids[1:]),
            ],
        )


def scored(token_id: int, num_top: int) -> TokenLogprobs:
    """The likelier, the smaller the id."""
    return TokenLogprobs(token_id, -0.5 - token_id / 100, tuple((n, -0.5 - n / 100) for n in range(num_top)))


def default_reply(prompt: str, params: SamplingParams, index: int) -> str:
    """Words by the request's seed; JSON where JSON is asked for."""
    if params.json_schema is not None:
        return json.dumps({"answer": 42})
    dice = random.Random(
        f"{params.seed} {index}" if params.temperature and params.seed is not None else index
    )
    return " ".join(dice.choice(WORDS) for _ in range(30))
