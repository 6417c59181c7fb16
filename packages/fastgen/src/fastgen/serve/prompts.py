"""From a request's JSON to token ids and sampling parameters: names, templates, tools, limits.

In: the models of `schemas`. Out: an `Asked`, whose jobs `loop` queues. Tokenizing long texts takes a while, so
`service` runs this in a thread of its own, one request at a time: a tokenizer is not made for several. Next:
`admission`, `loop`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from ..request import SamplingParams
from ..text import decoder_of
from .adapter_names import AdapterNames
from .errors import ApiError, bad
from .interface import Job
from .limits import Limits
from .schemas import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ResponseFormat,
    Sampling,
)
from .templates import ChatTemplate, output_schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions; chats go on as long as they may
PLAIN_FIELDS = (
    *(
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "min_tokens",
        "ignore_eos",
        "beam_width",
        "regex",
    ),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty"),
)


@dataclass(frozen=True)
class Asked:
    """What a request asks of the engine.

    Attributes:
        jobs: one for each prompt.
        model: its name as it is to be answered.
        tools: names of functions that the output may call.
    """

    jobs: list[Job]
    model: str
    tools: tuple[str, ...] = ()


class Prompts:
    """Reads requests for one model.

    Args:
        tokenizer: the model's.
        max_model_len: most tokens of prompt and output.
        room: see `Engine.room`.
        served_name: the model's name in the API.
        adapters: each is a model in the API.
        limits: see `Limits`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_model_len: int,
        room: Callable[[int, int], int],
        *,
        served_name: str,
        adapters: AdapterNames,
        limits: Limits,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._room = room
        self._served_name = served_name
        self._adapters = adapters
        self._limits = limits
        self._most_prompt_tokens = min(max_model_len - 1, limits.prompt_tokens or max_model_len)
        # Longer texts are too many tokens, whatever they say; to tokenize them would take seconds.
        self._most_characters = self._most_prompt_tokens * max(map(len, tokenizer.get_vocab()))
        self._template = ChatTemplate(tokenizer)
        self._decode = decoder_of(tokenizer)

    def completion(self, request: CompletionRequest) -> Asked:
        """Read a request for completions."""
        if request.max_tokens == 0 and not request.echo:
            raise bad("max_tokens", "expected >= 1 (or echo, to score a prompt), got 0")
        shape = _shape(request.response_format)
        params = self._params(request, _stops(request), None if shape is None else json.dumps(shape))
        params = replace(
            params,
            best_of=request.best_of,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
        )
        wanted = None if request.max_tokens is None else max(1, request.max_tokens)
        prompts = _several(request.prompt)
        self._check_sequences(len(prompts) * params.num_sequences)
        token_ids = [self._token_ids(prompt) for prompt in prompts]
        jobs = [
            self._job(request, ids, params, wanted, DEFAULT_MAX_TOKENS, len(prompts)) for ids in token_ids
        ]
        return Asked(jobs, request.model or self._served_name)

    def chat(self, request: ChatRequest) -> Asked:
        """Read a request for a chat completion."""
        if request.top_logprobs is not None and not request.logprobs:
            raise bad("top_logprobs", "expected logprobs true beside it, got none")
        schema, tools = output_schema(request, _shape(request.response_format))
        params = self._params(request, _stops(request), schema)
        params = replace(params, continues=bool(request.continue_final_message))
        if request.logprobs:
            params = replace(params, logprobs=request.top_logprobs or 0)
        self._check_sequences(params.num_sequences)
        token_ids = self._token_ids(self._template.render(request, tools), special=False)
        wanted = request.max_completion_tokens or request.max_tokens
        job = self._job(request, token_ids, params, wanted, self._max_model_len)
        names = tuple(tool["function"]["name"] for tool in tools)
        return Asked([job], request.model or self._served_name, names)

    def embedding(self, request: EmbeddingRequest) -> list[list[int]]:
        """Read a request for embeddings: the token ids of each text."""
        if self._adapter(request.model) is not None:
            raise bad("model", f"expected {self._served_name!r}: adapters give no embeddings")
        prompts = _several(request.input)
        if len(prompts) > self._limits.inputs:
            raise bad("input", f"expected at most {self._limits.inputs} texts, got {len(prompts)}")
        return [self._token_ids(prompt) for prompt in prompts]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """A prompt's text, for `echo`."""
        return self._decode(list(token_ids))

    # -- the parts -----------------------------------------------------------------------------------------

    def _params(self, request: Sampling, stop: tuple[str, ...], json_schema: str | None) -> SamplingParams:
        if request.stream_options is not None and not request.stream:
            raise bad("stream_options", "expected stream true beside it, got none")
        given = {name: getattr(request, name) for name in PLAIN_FIELDS}
        params: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(
            **params,
            max_tokens=max(DEFAULT_MAX_TOKENS, request.min_tokens or 0),  # the real one needs the prompt
            stop=stop,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()} or None,
            json_schema=json_schema,
        )

    def _job(
        self,
        request: Sampling,
        token_ids: list[int],
        params: SamplingParams,
        wanted: int | None,
        default: int,
        num_prompts: int = 1,
    ) -> Job:
        """A prompt with as many tokens of output as it may have."""
        room = self._max_model_len - len(token_ids)
        most = min(room, self._limits.max_tokens or room)
        scored = self._most_scored(params, len(token_ids), num_prompts)
        if wanted is not None and wanted > most:
            raise ApiError(
                400,
                f"max_tokens: expected at most {most} with a prompt of {len(token_ids)} tokens, got {wanted}",
                code="context_length_exceeded" if wanted > room else "max_tokens_exceeded",
                param="max_tokens",
            )
        if scored < (wanted or 1):
            raise bad(
                "logprobs",
                f"expected at most {self._limits.logprobs} log-probabilities (sequences times tokens times "
                f"logprobs + 1), got {wanted or 1} tokens where {max(0, scored)} fit; ask for less",
            )
        if wanted is None:
            held = self._room(len(token_ids), params.num_sequences)
            wanted = min(
                default, most, scored, max(1, held)
            )  # the engine says why it refuses what has no room
        params = replace(params, max_tokens=wanted)
        return Job(token_ids, params, request.priority or 0, self._adapter(request.model))

    def _most_scored(self, params: SamplingParams, num_prompt_tokens: int, num_prompts: int) -> int:
        """Tokens of each output that the limit of log-probabilities leaves."""
        if params.logprobs is None:
            return self._max_model_len
        most = self._limits.logprobs // (num_prompts * params.num_sequences * (params.logprobs + 1))
        return most if params.prompt_logprobs is None else most - num_prompt_tokens

    def _check_sequences(self, num_sequences: int) -> None:
        if num_sequences > self._limits.sequences:
            raise bad("n", f"expected at most {self._limits.sequences} sequences in all, got {num_sequences}")

    def _adapter(self, model: str | None) -> str | None:
        if model is None or model == self._served_name:
            return None
        if not self._adapters.knows(model):
            names = ", ".join([self._served_name, *self._adapters.all()])
            raise ApiError(
                404, f"model: expected one of {names}, got {model!r}", code="model_not_found", param="model"
            )
        return model

    def _token_ids(self, prompt: str | list[int], *, special: bool = True) -> list[int]:
        token_ids = self._encode(prompt, special) if isinstance(prompt, str) else prompt
        if not 1 <= len(token_ids) <= self._most_prompt_tokens:
            raise _misfit("tokens", len(token_ids), self._most_prompt_tokens)
        return token_ids

    def _encode(self, text: str, special: bool) -> list[int]:
        if len(text) > self._most_characters:
            raise _misfit("characters", len(text), self._most_characters)
        token_ids = list(self._tokenizer.encode(text, add_special_tokens=special))
        if not token_ids and isinstance(self._tokenizer.bos_token_id, int):
            return [self._tokenizer.bos_token_id]
        return token_ids


def _misfit(unit: str, size: int, most: int) -> ApiError:
    return ApiError(
        400,
        f"expected a prompt of 1 to {most} {unit}, got {size}",
        code="context_length_exceeded" if size else "empty_prompt",
        param="prompt",
    )


def _several(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    """One prompt or many, as many: each a text or token ids."""
    return list(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _stops(request: Sampling) -> tuple[str, ...]:
    stop = request.stop
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _shape(wanted: ResponseFormat | None) -> dict[str, JsonValue] | None:
    """The JSON schema that an output must fit."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise bad("response_format", "expected json_schema in it, got none")
    return wanted.json_schema.schema_
