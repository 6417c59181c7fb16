"""The serving benchmark's numbers as a page: a column for each model, a row for each number."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import _measure
import torch
import transformers

Found = dict[str, Any]


def page(found: dict[str, Found], options: argparse.Namespace) -> str:
    """The results as a page."""
    hardware = _measure.hardware()
    llama_cpp = {each["llama_cpp"] for each in found.values() if "llama_cpp" in each}
    versions = [f"transformers {transformers.__version__}", f"torch {torch.__version__}"]
    versions += [f"llama-cpp-python {version}" for version in llama_cpp]
    lines = [
        "# Serving on the CPU, bfloat16, Llama's shape",
        "",
        f"{hardware['processor']} ({hardware['instruction_set']}), "
        f"{torch.get_num_threads()} threads; {', '.join(versions)}. Medians of as many rounds as stand there, in "
        "which engines take turns; bold: our speed over theirs.",
        "",
        "| | " + " | ".join(found) + " |",
        "| --- |" + " --- |" * len(found),
    ]

    def row(title: str, value: Callable[[Found], str]) -> None:
        def cell(each: Found) -> str:
            try:
                return value(each)
            except KeyError:  # that peer did not run
                return ""

        if any(cells := [cell(each) for each in found.values()]):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")

    row("measured", lambda f: str(f["date"]))
    row("rounds", lambda f: f"{f['rounds']}")
    row("rounds of one stream, of prompts alone", lambda f: f"{f['rounds_alone']}")
    row("mixed load: requests", lambda f: f"{f['requests']}")
    row("tokens a second", lambda f: f"{f['fastgen_tokens_s']:.0f}")
    for peer, title in (
        ("llama_cpp", "llama.cpp, 32 sequences in a batch"),
        ("static", f"`generate`, static batches of {options.batch}"),
        ("continuous", "continuous batching of transformers"),
    ):
        row(title, lambda f, peer=peer: f"{f[f'{peer}_tokens_s']:.0f}: **{f[f'{peer}_ratio']:.2f} x**")  # type: ignore[misc]
    row("tokens of a forward where throughput saturates", lambda f: f"{f['prompt_fill']:.0f}")
    row("one stream, ms a token", lambda f: f"{1e3 * f['stream_s']:.2f}")
    row(
        "llama.cpp",
        lambda f: (
            f"{1e3 * f['llama_cpp_stream_s']:.2f} ({f['llama_cpp_stream']}): **{f['stream_ratio']:.2f} x**"
        ),
    )
    row("weight bytes / bandwidth", lambda f: f"**{100 * f['stream_share']:.0f} %**")
    row("a prompt of 1,024 tokens, tokens a second", lambda f: f"{f['prompt_tokens_s']:.0f}")
    row(
        "llama.cpp",
        lambda f: (
            f"{f['llama_cpp_prompt_tokens_s']:.0f} ({f['llama_cpp_prompt']}): **{f['prompt_ratio']:.2f} x**"
        ),
    )
    for kind, title in (
        ("default", "SplitFuse, forwards filled to where throughput saturates"),
        ("fixed", f"SplitFuse, {options.gap_budget} tokens in a forward"),
        ("gap_s", "SplitFuse, `gap_s` of 1.4 x the p95 without"),
        ("prefill_first", "whole prompts first"),
    ):
        row(
            f"p95 gap beside a prompt of 4,096 tokens / without; seconds of the prompt: {title}",
            lambda f, kind=kind: f"**{f[f'{kind}_gap']:.2f}**; {f[f'{kind}_prompt_s']:.1f}",  # type: ignore[misc]
        )
    for length in (1000, 4000):
        row(
            f"first token of {length:,}, nine tenths of them shared: computed / cached",
            lambda f, length=length: (  # type: ignore[misc]
                f"**{f[f'first_token_computed_{length}_s'] / f[f'first_token_cached_{length}_s']:.1f} x**"
            ),
        )
    return "\n".join([*lines, ""])
