"""A conversation as the model's chat template writes it, and the tools that the template is told of.

In: a `ChatRequest`. Out: text. Next: `prompts` makes token ids of it.
"""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from .errors import ApiError, bad
from .schemas import ChatRequest, Message, NamedTool
from .tools import call_schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTemplate:
    """The template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._taken = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)

    def render(self, request: ChatRequest, tools: list[Any]) -> str:
        """The conversation as the model's template writes it."""
        if self._tokenizer.chat_template is None:
            raise ApiError(
                400, "expected a model with a chat template, this one has none; use /v1/completions"
            )
        variables: dict[str, Any] = dict(request.chat_template_kwargs or {})
        if taken := self._taken & variables.keys():
            raise bad("chat_template_kwargs", f"expected variables of the template, got {sorted(taken)}")
        if tools and "tools" not in self._tokenizer.get_chat_template(None, tools):
            raise bad("tools", "expected none: this model's chat template knows no tools")
        if request.continue_final_message and request.add_generation_prompt:
            raise bad("continue_final_message", "expected add_generation_prompt false beside it, got true")
        opens = request.add_generation_prompt is not False and not request.continue_final_message
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [_message(message) for message in request.messages],
                    tools=tools or None,
                    add_generation_prompt=opens,
                    continue_final_message=bool(request.continue_final_message),
                    tokenize=False,
                    **variables,
                )
            )
        except Exception as error:  # a template is a program of the model's author and raises what it likes
            raise bad("messages", f"expected what the chat template takes; it says: {error}") from error


def output_schema(request: ChatRequest, answer: dict[str, JsonValue] | None) -> tuple[str | None, list[Any]]:
    """The JSON schema that the output must fit, if any, and the tools that the template is told of.

    Args:
        request: may offer tools, or demand a call.
        answer: the schema of an answer, where the request has one.
    """
    choice, tools = request.tool_choice, request.tools or []
    if not tools and choice not in (None, "none", "auto"):
        raise bad("tool_choice", "expected tools beside it, got none")
    if not tools or choice == "none":
        return None if answer is None else json.dumps(answer), []
    functions = [tool.function for tool in tools]
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
        if not functions:
            raise bad("tool_choice", f"expected a tool that is given, got {choice.function.name!r}")
    demanded = choice == "required" or isinstance(choice, NamedTool)
    if demanded and answer is not None:
        raise bad("response_format", "expected none where tool_choice demands a call")
    told = [tool.model_dump(exclude_none=True) for tool in tools]
    return (call_schema(functions, answer) if demanded or answer is not None else None), told


def _message(message: Message) -> dict[str, Any]:
    """A message as templates know it: text in one piece, arguments of calls as objects."""
    told = message.model_dump(exclude_none=True)
    told["role"] = "system" if message.role == "developer" else message.role
    if isinstance(message.content, list):
        told["content"] = "\n".join(part.text for part in message.content)
    told.setdefault("content", "")
    for call in told.get("tool_calls", []):
        call["function"]["arguments"] = _parsed(call["function"]["arguments"])
    return told


def _parsed(text: str) -> Any:
    """JSON as what it says; anything else stays text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
