"""`fastgen generate` and `fastgen chat`: text to the terminal, as it comes."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from ...errors import RequestError
from ...request import SamplingParams
from ..interface import Engine
from .options import add_engine_options, amount, loaded_engine, positive, text_of

if TYPE_CHECKING:
    from argparse import _SubParsersAction

GENERATE_EPILOG = """
examples:
  fastgen generate ./model "Once upon a time"
  fastgen generate ./model --chat "What is a shard?" --temperature 0
  fastgen generate ./model - < prompt.txt > answer.txt               the prompt from standard input
  fastgen generate ./model "A person as JSON:" --json-schema person.json
"""
CHAT_EPILOG = """
example:
  fastgen chat ./model --system "Answer in one sentence."

An empty line or Ctrl-D ends the conversation; Ctrl-C stops an answer.
"""


def add_generate(commands: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text; numbers of tokens and speed go to standard error.",
        epilog=GENERATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="the model's directory")
    parser.add_argument("prompt", metavar="PROMPT", help="the text; - reads it from standard input")
    parser.add_argument(
        "--chat", action="store_true", help="as a user's message, in the model's chat template"
    )
    _add_sampling(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run_generate)


def add_chat(commands: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "chat",
        help="a conversation in the terminal",
        description="Talk to a model.",
        epilog=CHAT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="the model's directory")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    _add_sampling(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run_chat)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="at most so many (256)")
    group.add_argument(
        "--temperature", type=amount, default=0.8, metavar="X", help="0: the most likely token (0.8)"
    )
    group.add_argument("--top-p", type=amount, default=1.0, metavar="X", help="(1)")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="(0: all)")
    group.add_argument("--repetition-penalty", type=amount, default=1.0, metavar="X", help="(1)")
    group.add_argument("--seed", type=int, metavar="N", help="makes the choice reproducible")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="where to end; may be repeated"
    )
    group.add_argument("--json-schema", metavar="FILE", help="the output is JSON of this schema")


def _params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        json_schema=text_of(args.json_schema) if args.json_schema else None,
    )


def run_generate(args: argparse.Namespace) -> int:
    """One prompt."""
    params = _params(args)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    with loaded_engine(args.path, args) as engine:
        if args.chat:
            params = replace(params, continues=False)
            prompt_ids = _chat_ids(engine, [{"role": "user", "content": text}])
        else:
            prompt_ids = list(engine.tokenizer.encode(text))
        started_s = time.perf_counter()
        try:
            _, num_tokens = stream(engine, prompt_ids, params, _write)
        finally:
            _write("\n")
        elapsed_s = time.perf_counter() - started_s
    sys.stderr.write(
        f"{len(prompt_ids)} tokens of prompt, {num_tokens} of output in {elapsed_s:.2f} s "
        f"({num_tokens / elapsed_s:.1f} tokens/s)\n"
    )
    return 0


def run_chat(args: argparse.Namespace) -> int:
    """Turn by turn."""
    params = replace(_params(args), continues=False)
    with loaded_engine(args.path, args) as engine:
        _converse(engine, params, args.system)
    return 0


def _converse(engine: Engine, params: SamplingParams, system: str) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            said = ""
        if not said:
            return
        messages.append({"role": "user", "content": said})
        with interrupts() as interrupted:
            answer, _ = stream(engine, _chat_ids(engine, messages), params, _write, interrupted)
        _write("\n")
        messages.append({"role": "assistant", "content": answer})


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C has come: to be asked between steps, for one that is left half-way leaves ranks apart.

    A second one raises, as ever.
    """
    come = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        come.set()
        signal.signal(number, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield come.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def stream(
    engine: Engine,
    prompt_ids: list[int],
    params: SamplingParams,
    write: Callable[[str], None],
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[str, int]:
    """Generate one sequence, writing text as it comes; gives all of it and the number of tokens."""
    texts, num_tokens = [], 0
    engine.add("terminal", prompt_ids, params)
    try:
        while engine.has_work and not interrupted():
            for output in engine.step():
                write(output.text)
                texts.append(output.text)
                num_tokens += len(output.new_token_ids)
    finally:
        engine.abort("terminal")  # nothing, where it has ended
    return "".join(texts), num_tokens


def _chat_ids(engine: Engine, messages: list[dict[str, str]]) -> list[int]:
    if engine.tokenizer.chat_template is None:
        raise RequestError("expected a model with a chat template, this one has none; use `fastgen generate`")
    text = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(engine.tokenizer.encode(str(text), add_special_tokens=False))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
