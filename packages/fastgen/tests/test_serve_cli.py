"""The `fastgen` command: what it prints, what its options come to, and one line where something is wrong."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastgen.serve
import pytest
import torch
from fake_engine import FakeEngine
from fastgen.config import EngineConfig, Weights
from fastgen.errors import ModelError
from fastgen.output import Output
from fastgen.serve.cli import build_parser, main
from fastgen.serve.commands.generate import interrupts
from fastgen.serve.commands.options import engine_config
from fastgen.serve.commands.serve import server_config
from server_lab import Served, wait_until


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, EngineConfig, FakeEngine]]:
    """Models that commands load are fake ones, noted here."""
    made: list[tuple[str, EngineConfig, FakeEngine]] = []

    def build_engine(path: str, config: EngineConfig) -> FakeEngine:
        if path == "broken":
            raise ModelError(
                "model.safetensors: expected tensor 'lm_head.weight',\n  got none; download it again"
            )
        made.append((path, config, FakeEngine()))
        return made[-1][2]

    module = types.ModuleType("fastgen.llm")
    module.build_engine = build_engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastgen.llm", module)
    return made


Built = list[tuple[str, EngineConfig, FakeEngine]]


def parsed(*argv: str) -> argparse.Namespace:
    return build_parser().parse_args(argv)


@pytest.mark.parametrize("command", [[], ["serve"], ["generate"], ["chat"], ["bench"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "example" in shown
    # The examples are commands that parse.
    for line in re.findall(r"^  (fastgen .*?)(?: {3,}.*)?$", shown, re.MULTILINE):
        words = [word.strip("\"'") for word in re.findall(r'"[^"]*"|\S+', line.split(" <")[0])]
        assert parsed(*words[1:])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["serve"], "PATH"),
        (["serve", "model", "--weights", "int3"], "int3"),
        (["serve", "model", "--token-budget", "0"], ">= 1"),
        (["serve", "model", "--replicas", "0"], ">= 1"),
        (["serve", "model", "--max-gap-ms", "-3"], ">= 0"),
        (["generate", "model", "x", "--tensor-parallel", "none"], "none"),
        (["generate", "model", "x", "--temperature", "-1"], ">= 0"),
        (["bench", "http://x", "--clients", "0"], "above 0"),
        (["bench", "http://x", "--prompt-tokens", "9-3"], "LOW-HIGH"),
        (["fly"], "fly"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    shown = capsys.readouterr()
    assert (exit_.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert message in shown.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "broken", "x"], "expected tensor 'lm_head.weight', got none"),
        (["serve", "broken"], "lm_head.weight"),
        (["serve", "model", "--port", "99999"], "0 to 65535"),
        (["serve", "model", "--api-key-file", "/no/such/file"], "No such file"),
        (["serve", "model", "--adapters", "x"], "expected NAME=DIR, got 'x'"),
        (["serve", "model", "--max-gap-ms", "0"], "gap_s=...): expected seconds above 0, got 0.0"),
        (["serve", "model", "--replicas", "2", "--device", "cuda:0"], "expected 'cuda' for 2 processes"),
        (["generate", "model", "x", "--top-p", "2"], "top_p"),
        (
            ["generate", "model", "x", "--device", "gpu"],
            "--device: expected one such as cpu or cuda:0, got 'gpu'",
        ),
        (["generate", "model", "x", "--json-schema", sys.executable], "expected text in UTF-8"),
        (["bench", "ftp://x"], "expected a URL"),
        (
            ["bench", "http://x", "--weights", "int8"],
            "--weights: expected none, for it is of a model in this",
        ),
        (["bench", "model", "--api-key", "k"], "--api-key: expected none, for it is of a server"),
        (["serve", "model", "--drafts", "3"], "--drafts 3: expected --speculate beside it"),
    ],
)
def test_errors_are_one_line(
    argv: list[str], message: str, built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(f"fastgen {argv[0]}: error: ")
    assert message in shown.err


def test_options_of_the_engine() -> None:
    plain = engine_config(parsed("serve", "model"))
    assert plain == EngineConfig()
    argv = (
        "--dtype bfloat16 --weights int4 --cache-gib 1.5 --cache-dtype int8 --swap-gib 2 --no-prefix-cache "
    )
    argv += "--token-budget 64 --max-gap-ms 12.5 --max-sequences 7 --max-model-len 99 --batch-invariant --device cpu"
    config = engine_config(parsed("serve", "model", *argv.split(), "--speculate", "ngram", "--drafts", "3"))
    assert (config.dtype, config.weights, config.cache.dtype) == (torch.bfloat16, Weights.INT4, torch.int8)
    assert (config.cache.max_bytes, config.cache.swap_bytes, config.cache.prefix) == (3 * 2**29, 2**31, False)
    assert (config.schedule.token_budget, config.schedule.gap_s, config.schedule.max_sequences) == (
        64,
        0.0125,
        7,
    )
    assert (config.max_model_len, config.batch_invariant, config.device) == (99, True, torch.device("cpu"))
    assert config.speculation is not None
    assert (config.speculation.num_drafts, config.speculation.ngram) == (3, 3)
    draft = engine_config(parsed("serve", "model", "--speculate", "./small")).speculation
    assert draft is not None
    assert draft.draft_model == "./small"


def test_options_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\ntwo\n")
    argv = f"--host 0.0.0.0 --port 9 --api-key zero --api-key-file {tmp_path}/keys --name gpt --max-body-mib 0.5 "
    argv += "--max-prompt-tokens 5 --max-tokens 6 --max-concurrent 7 --max-queued 8 --request-timeout 9 "
    argv += "--drain-timeout 10 --cors-origin https://a --adapters x=y z=w --allowed-host me"
    config = server_config(parsed("serve", "model", *argv.split()))
    assert (config.host, config.port, config.api_keys, config.served_name) == (
        "0.0.0.0",
        9,
        ("zero", "one", "two"),
        "gpt",
    )
    assert (config.adapters, config.cors_origins) == (("x", "z"), ("https://a",))
    assert config.hosts is not None
    assert "me" in config.hosts
    limits = config.limits
    assert (limits.body_bytes, limits.prompt_tokens, limits.max_tokens) == (2**19, 5, 6)
    assert (limits.concurrent, limits.queued, limits.request_timeout_s, limits.drain_timeout_s) == (
        7,
        8,
        9.0,
        10.0,
    )
    assert "zero" not in repr(config)


def test_generate(built: Built, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["generate", "model", "Hello", "--max-tokens", "9", "--seed", "3", "--weights", "int8"]) == 0
    shown = capsys.readouterr()
    path, config, engine = built[0]
    assert (path, config.weights) == ("model", Weights.INT8)
    assert engine.seen[0]["params"].max_tokens == 9
    assert 0 < len(shown.out.strip()) <= 9
    assert re.fullmatch(r"5 tokens of prompt, 9 of output in \d+\.\d\d s \(\d+\.\d tokens/s\)\n", shown.err)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a file"))
    assert main(["generate", "model", "-", "--chat"]) == 0
    engine = built[1][2]
    assert (
        engine.tokenizer.decode(engine.seen[0]["prompt_ids"]) == "<|user|>from a file<|end|>\n<|assistant|>"
    )


def test_chat(built: Built, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["Hello", "Go on", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert main(["chat", "model", "--system", "Be brief.", "--max-tokens", "4"]) == 0
    engine = built[0][2]
    answer = capsys.readouterr().out.splitlines()[0]
    assert engine.tokenizer.decode(engine.seen[1]["prompt_ids"]) == (
        f"<|system|>Be brief.<|end|>\n<|user|>Hello<|end|>\n<|assistant|>{answer}<|end|>\n"
        "<|user|>Go on<|end|>\n<|assistant|>"
    )


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: processes in the background may have been started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_an_answer_between_two_steps(
    built: Built, interruptible: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is left half-way would leave ranks apart; a second Ctrl-C ends the command, as ever."""
    said = iter(["hello", "again", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    step, steps = FakeEngine.step, []

    def interrupted(engine: FakeEngine) -> list[Output]:
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        steps.append(step(engine))
        return steps[-1]

    monkeypatch.setattr(FakeEngine, "step", interrupted)
    assert main(["chat", "model", "--max-tokens", "40"]) == 0
    (_, _, engine) = built[0]
    assert not engine.has_work
    assert len(steps) > 40, "the second answer is whole"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interrupts() as come:
        os.kill(os.getpid(), signal.SIGINT)
        assert come()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_bench_of_a_model(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "bench",
        "model",
        "--clients",
        "1,2",
        "--rates",
        "200",
        "--requests",
        "6",
        "--prompt-tokens",
        "5-20",
    ]
    argv += ["--output-tokens", "3-8", "--json", f"{tmp_path}/b.json", "--picture", f"{tmp_path}/b.png"]
    pytest.importorskip("matplotlib")
    assert main(argv) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() or line.split()[0] for line in shown[1:]]
    assert ["1 clients" in shown[1], "2 clients" in shown[2], "200 requests/s" in shown[3]] == [True] * 3
    written: dict[str, Any] = json.loads((tmp_path / "b.json").read_text())
    assert [load["num_requests"] for load in written["loads"]] == [6, 6, 6]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    engine = built[0][2]
    assert all(seen["params"].ignore_eos for seen in engine.seen)
    # A prefix cache would know no prompt of an earlier load.
    assert len({tuple(seen["prompt_ids"]) for seen in engine.seen}) == len(engine.seen) == 19


def test_serve_in_a_process() -> None:
    """The whole way: options, the line that says ready, a request, SIGTERM, exit code 0."""
    program = (
        "import sys, types; from fake_engine import FakeEngine; module = types.ModuleType('fastgen.llm');"
        "module.build_engine = lambda path, config: FakeEngine(); sys.modules['fastgen.llm'] = module;"
        "from fastgen.serve.cli import main; sys.exit(main(['serve', 'model', '--port', '0', '--name', 'mine']))"
    )
    paths = [str(Path(fastgen.serve.__file__).parents[2]), str(Path(__file__).parent)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        try:
            assert popen.stdout is not None
            line = popen.stdout.readline()
            found = re.fullmatch(
                r"serving mine on (http://127\.0\.0\.1:\d+) \(chat page; API: \1/v1\)\n", line
            )
            assert found
            served = Served(found[1], None, None)  # type: ignore[arg-type]
            assert served.complete(model="mine").status == 200
            wait_until(lambda: served.get("/stats").json["running"] == 0)
            popen.send_signal(signal.SIGTERM)
            assert popen.wait(10) == 0
            assert popen.stdout.read() == ""
            assert popen.stderr is not None
            assert popen.stderr.read() == ""
        finally:
            popen.kill()
