"""What the server says in JSON: OpenAI's answers. Filled by `answers`, described in /openapi.json."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Finish = Literal["stop", "length", "tool_calls", "abort"]


class Answer(BaseModel):
    """Any part of an answer. What is not set is left out, what is set to None is null."""

    model_config = ConfigDict(extra="forbid")


class CachedTokens(Answer):
    """Of a prompt's tokens."""

    cached_tokens: int


class Usage(Answer):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class CompletionLogprobs(Answer):
    """Log-probabilities in the shape of completions: lists side by side."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One sequence, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None


class Completion(Answer):
    """The answer of /v1/completions, and a chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the output, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities in the shape of chats: a list of tokens."""

    content: list[TokenLogprob]


class CalledFunction(Answer):
    """What the model calls."""

    name: str
    arguments: str


class CalledTool(Answer):
    """See `CalledFunction`; `index` only in streams."""

    index: int | None = None
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answer):
    """The assistant's turn, or what a chunk adds to it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(Answer):
    """One sequence."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None


class ChatCompletion(Answer):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(Answer):
    """What a chunk adds to one sequence."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(Answer):
    """One event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Embedding(Answer):
    """One text's vector: numbers, or base64 of little-endian 32-bit floats."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Numbers of tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    """The answer of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(Answer):
    """A model, or an adapter of it (`parent` is the model)."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = None
    max_model_len: int


class Models(Answer):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class ReplicaHealth(Answer):
    """One of several servers behind one address."""

    replica: int
    status: str
    requests: int
    restarts: int
    detail: str | None = None


class Health(Answer):
    """The answer of /health; `replicas` where there are several."""

    status: Literal["ok", "stopping", "failed"]
    detail: str | None = None
    replicas: list[ReplicaHealth] | None = None


class ServerStats(Answer):
    """The answer of /stats: what the chat page shows."""

    waiting: int
    running: int
    swapped: int
    blocks_used: int
    blocks_total: int
    generated_tokens_total: int
    prompt_tokens_total: int
    prefix_hit_tokens_total: int
    requests: int


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(Answer):
    """Any answer that is not 2xx."""

    error: ErrorDetail = Field(description="What went wrong.")


def dumped(answer: Answer) -> str:
    """As JSON."""
    return answer.model_dump_json(exclude_unset=True)
