"""What JSON may say to the server: OpenAI's requests, and a few fields more that engines of this kind share.

A field that would have no effect is not accepted: unknown ones that say something are refused by name, known ones of
OpenAI's that mean nothing here only at the value that asks for nothing. Next: `prompts`. Answers are
in `answer_schemas`.

Note [One fault]
A body may hold millions of values, each of them wrong, and to collect so many errors takes a while in which the event
loop does nothing else: lists end at their first fault, objects of many fields and long conversations are refused as a
whole.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

MOST_FIELDS = 100
MOST_BIASES = 1024
MOST_TURNS = 10_000
EMPTY: tuple[JsonValue, ...] = (None, [], {})
T = TypeVar("T")


def _whole(value: object) -> object:
    """JSON knows no integers: 5.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _truth(value: object) -> object:
    """For a literal False, 0 would do."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def _at_most(count: int) -> BeforeValidator:
    """Refuses objects of more fields; see Note [One fault]."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"expected at most {count} fields, got {len(value)}")
        return value

    return BeforeValidator(check)


def _few_turns(value: object) -> object:
    """Refuses conversations of more turns, parts and calls; see Note [One fault]."""
    if not isinstance(value, list):
        return value
    count = len(value)
    for turn in value[:MOST_TURNS]:
        parts = (turn.get("content"), turn.get("tool_calls")) if isinstance(turn, dict) else ()
        count += sum(len(each) for each in parts if isinstance(each, list))
    if count > MOST_TURNS:
        raise ValueError(f"expected at most {MOST_TURNS} turns, parts of content and calls, got {count}")
    return value


Several = Annotated[list[T], Field(fail_fast=True)]
SomeOf = Annotated[list[T], Field(fail_fast=True, min_length=1)]
Int = Annotated[int, BeforeValidator(_whole)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[Int, Field(ge=-(2**63), lt=2**63)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
Text = Annotated[str, Field(max_length=2**23)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Tokens = SomeOf[TokenId]


class Strict(BaseModel):
    """A part of a request: nothing unknown, no NaN, no text for a number.

    Unknown fields that are null or empty are left out: clients send back what they were told, with their own fields.
    """

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        strict=True,
        frozen=True,
        json_schema_extra={"additionalProperties": {"enum": list(EMPTY)}, "maxProperties": MOST_FIELDS},
    )

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        if len(given) > MOST_FIELDS:
            raise ValueError(f"expected at most {MOST_FIELDS} fields, got {len(given)}")
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in given.items() if name in known or value not in EMPTY}


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: bool = Field(False, description="A last chunk with the numbers of tokens.")
    include_obfuscation: Annotated[Literal[False] | None, BeforeValidator(_truth)] = None
    continuous_usage_stats: bool = Field(False, description="The numbers of tokens so far in every chunk.")


class Inert(Strict):
    """Fields of OpenAI's that ask for nothing here; other values than these are refused."""

    user: str | None = Field(None, max_length=1000, description="Not used.")
    metadata: Annotated[dict[str, str], Field(max_length=MOST_FIELDS), _at_most(MOST_FIELDS)] | None = Field(
        None, description="Not used."
    )
    service_tier: Literal["auto", "default"] | None = None
    store: Annotated[Literal[False] | None, BeforeValidator(_truth)] = None


class Sampling(Inert):
    """How tokens are chosen, in both kinds of completion."""

    model: str | None = Field(
        None, max_length=1000, description="The model, or an adapter; left out: the model."
    )
    n: Int | None = Field(None, ge=1, le=1024, description="Sequences returned.")
    temperature: float | None = Field(None, ge=0.0, le=100.0, description="0 takes the most likely token.")
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    logit_bias: (
        Annotated[dict[TokenKey, Bias], Field(max_length=MOST_BIASES), _at_most(MOST_BIASES)] | None
    ) = Field(None, description="Added to the logits of tokens, which are named by their ids.")
    seed: Seed | None = Field(None, description="Makes the choice reproducible.")
    stop: StopText | Annotated[Several[StopText], Field(max_length=64)] | None = Field(
        None, description="Texts at which a sequence ends; not part of it."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    # Beyond OpenAI's.
    top_k: Int | None = Field(None, ge=0, lt=2**31, description="Only the k most likely tokens; 0: all.")
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100.0)
    min_tokens: Int | None = Field(None, ge=0, lt=2**31)
    stop_token_ids: Annotated[Several[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    beam_width: Int | None = Field(None, ge=0, le=64, description="Beams of a beam search; 0 samples.")
    length_penalty: float | None = Field(None, ge=-10.0, le=10.0, description="Of beam search.")
    regex: str | None = Field(
        None, min_length=1, max_length=10_000, description="What the output must match."
    )
    priority: Int | None = Field(None, ge=-1000, le=1000, description="Lower runs first.")


class JsonSchemaSpec(Strict):
    """A named JSON schema."""

    name: str = Field("answer", max_length=1000)
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What shape the output has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaSpec | None = None


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Text | Tokens | SomeOf[Text] | SomeOf[Tokens]
    max_tokens: Int | None = Field(None, ge=0, lt=2**31, description="16 if left out; 0 only with echo.")
    best_of: Int | None = Field(
        None, ge=1, le=1024, description="Sequences made, of which the best n return."
    )
    echo: bool | None = Field(None, description="Return the prompt before the output.")
    logprobs: Int | None = Field(None, ge=0, le=20)
    suffix: Literal[""] | None = Field(None, description="Only empty: inserting is not supported.")
    response_format: ResponseFormat | None = None


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class FunctionCall(Strict):
    """A call that the model made earlier in the conversation."""

    name: str = Field(min_length=1, max_length=1000)
    arguments: Text = Field(description="JSON text.")
    parsed_arguments: JsonValue = Field(None, exclude=True, description="Not used: `arguments` says it.")


class ToolCall(Strict):
    """See `FunctionCall`."""

    id: str | None = Field(None, max_length=1000)
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Int | None = Field(None, exclude=True, description="Not used: chunks of a stream have it.")


class Message(Strict):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Several[TextPart] | None = None
    name: str | None = Field(None, max_length=1000)
    tool_calls: Annotated[Several[ToolCall], Field(max_length=1000)] | None = None
    tool_call_id: str | None = Field(None, max_length=1000)
    reasoning_content: Text | None = None
    refusal: Text | None = None


class FunctionSpec(Strict):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=1000)
    description: Text | None = None
    parameters: dict[str, JsonValue] | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


class Tool(Strict):
    """See `FunctionSpec`."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Strict):
    """The one to call."""

    name: str = Field(min_length=1, max_length=1000)


class NamedTool(Strict):
    """See `NamedFunction`."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[SomeOf[Message], Field(max_length=MOST_TURNS), BeforeValidator(_few_turns)]
    max_tokens: Int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: Int | None = Field(
        None, ge=1, lt=2**31, description="The newer name of max_tokens."
    )
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=20, description="Only with logprobs.")
    response_format: ResponseFormat | None = None
    tools: Annotated[Several[Tool], Field(max_length=1000)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: only the first call is returned.")
    # Beyond OpenAI's.
    add_generation_prompt: bool | None = Field(
        None, description="Open the assistant's turn; true if left out."
    )
    continue_final_message: bool | None = Field(None, description="Go on with the last message.")
    chat_template_kwargs: (
        Annotated[
            dict[str, bool | int | float | str | None],
            Field(max_length=MOST_FIELDS),
            _at_most(MOST_FIELDS),
        ]
        | None
    ) = Field(None, description="Variables of the chat template, such as enable_thinking.")


class EmbeddingRequest(Strict):
    """`POST /v1/embeddings`."""

    model: str | None = Field(None, max_length=1000)
    input: Text | Tokens | SomeOf[Text] | SomeOf[Tokens]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = Field(None, max_length=1000, description="Not used.")
