"""The demo learns, stops when asked, goes on, and proves what it claims. Tiny sizes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request

import pytest
import torch
from zerostack.cli import main
from zerostack.demo import text
from zerostack.demo.gpt import GPT, GPTConfig
from zerostack.demo.settings import CONTEXT, Settings, num_params


def demo(out, *arguments):
    command = [
        sys.executable,
        "-m",
        "zerostack",
        "demo",
        "--out",
        str(out),
        "--params",
        "60K",
        "--procs",
        "2",
    ]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def read_until(stream, pattern):
    seen = ""
    while not re.search(pattern, seen):
        character = stream.read(1)
        assert character, seen
        seen += character
    return seen


def test_ctrl_c_saves_resume_goes_on_and_the_proofs_hold(tmp_path):
    corpus = tmp_path / "text"
    corpus.mkdir()
    for index in range(20):
        (corpus / f"{index:02}.txt").write_text(f"line {index} of a small text, again and again\n" * 20)
    out = tmp_path / "out"
    steps = 400
    running = demo(out, "--text", str(corpus), "--steps", str(steps))
    read_until(running.stderr, r"\b(1[0-9]|[2-9][0-9])/400 .*tokens/s")  # the steps compared below have run
    os.killpg(running.pid, signal.SIGINT)
    output, errors = running.communicate(timeout=120)
    assert running.returncode == 130, output + errors
    assert "Stopping after this step and saving" in errors
    assert "Stopped after step" in output
    assert f"zerostack demo --resume --text {corpus} --steps 400 --params 60000 --out {out}" in output
    tag = (out / "checkpoints" / "latest").read_text().strip()
    stopped = int(tag.removeprefix("global_step"))
    assert 10 <= stopped < steps
    assert len(json.loads((out / "losses.json").read_text())["ours"]) == stopped

    more = stopped + 5
    resumed = demo(out, "--text", str(corpus), "--steps", str(more), "--resume")
    output, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output + errors
    assert f"Going on from {out / 'checkpoints' / tag}" in output
    losses = json.loads((out / "losses.json").read_text())
    assert len(losses["ours"]) == more
    assert losses["ours"][-1] < losses["ours"][0] - 0.5
    ddp = losses["ddp"]
    assert len(ddp) == 25
    assert losses["ours"][:10] == pytest.approx(ddp[:10], abs=0.05)
    rows = [line.split() for line in output.split("uninterrupted")[1].splitlines()]
    rows = [row for row in rows if len(row) == 4 and row[0].isdigit()]
    assert [int(row[0]) for row in rows] == [more + 1, more + 2, more + 3]
    assert all(float(row[3]) < 1e-5 for row in rows)
    assert "(50%)" in output
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_text()) > 100
    assert_it_can_be_served(output)


def assert_it_can_be_served(output):
    """By the command at the end of what the demo has printed."""
    pytest.importorskip("fastgen")
    command = output.splitlines()[-1].strip()
    assert re.fullmatch(r"\S+fastgen serve \S+/out/model", command)
    served = subprocess.Popen(
        [*shlex.split(command), "--port", "0", "--cache-gib", "0.01"], stdout=subprocess.PIPE, text=True
    )
    try:
        url = re.search(r"http://[\w.:]+", served.stdout.readline()).group()
        for path, asked in [
            ("completions", {"prompt": "line 7 of"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "line 7 of"}]}),
        ]:
            body = json.dumps({**asked, "max_tokens": 9, "temperature": 0}).encode()
            request = urllib.request.Request(f"{url}/v1/{path}", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                usage = json.load(answer)["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (9, 9)
        served.terminate()
        assert served.wait(30) == 0
    finally:
        served.kill()


def test_it_goes_on_with_any_number_of_processes(tmp_path):
    book = tmp_path / "text.txt"
    book.write_text("a line of a small text, again and again\n" * 400)
    out = tmp_path / "out"
    steps = 12
    for procs, more in [("3", ()), ("1", ("--resume",))]:
        running = demo(out, "--text", str(book), "--steps", str(steps), "--procs", procs, *more)
        output, errors = running.communicate(timeout=120)
        assert running.returncode == 0, output + errors
        assert len(json.loads((out / "losses.json").read_text())["ours"]) == steps
        steps += 2


def test_missing_or_short_text_is_refused_at_once(tmp_path, capsys):
    for path, message in [
        (tmp_path / "absent", "no such file or folder"),
        (tmp_path, "no text file in this folder"),
    ]:
        assert main(["demo", "--text", str(path), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert main(["demo", "--text", str(short)]) == 2
    assert "9 bytes are too few; give at least 5160" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_very_different_sizes_are_text_enough(tmp_path):
    for index in range(25):
        (tmp_path / f"{index:02}.txt").write_text("tiny\n" if index == 19 else "a longer text\n" * 1000)
    corpus = text.load(str(tmp_path), CONTEXT)
    assert len(corpus.held_out) > 10_000
    assert len(corpus.train) > len(corpus.held_out)


def test_the_standard_library_is_text_enough_and_part_is_kept_apart():
    corpus = text.load(None, CONTEXT)
    assert len(corpus.train) > 5_000_000
    assert len(corpus.held_out) > 100_000
    again = text.load(None, CONTEXT)
    assert torch.equal(corpus.train, again.train)
    tokens, targets = corpus.batch(seed=0, step=3, rank=1, size=2, context=CONTEXT)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens, again.batch(seed=0, step=3, rank=1, size=2, context=CONTEXT)[0])
    assert not torch.equal(tokens, corpus.batch(seed=0, step=4, rank=1, size=2, context=CONTEXT)[0])


@pytest.mark.parametrize("wanted", [6e4, 1.8e6, 5e6, 3e7])
def test_the_model_has_about_the_size_asked_for(wanted):
    size = Settings(num_params=wanted).model_config()
    with torch.device("meta"):
        model = GPT(size)
    assert sum(p.numel() for p in model.parameters()) == num_params(size)
    assert num_params(size) == pytest.approx(wanted, rel=0.6)


def test_the_model_learns_and_generates_without_any_of_our_packages():
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, width=32, heads=2, context=16))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tokens = torch.arange(16).repeat(4, 1)
    first = None
    for _ in range(30):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
    assert model.generate(torch.tensor([[0]]), 10, top_k=1)[0].tolist() == list(range(11))
    untied = GPT(GPTConfig(layers=1, width=32, heads=2, tied=False))
    assert untied.head.weight is not untied.embed.weight
