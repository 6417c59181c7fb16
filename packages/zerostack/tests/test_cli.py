"""The commands: help that teaches, numbers of the paper, errors without a traceback."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
from zerostack.cli import main
from zerostack.cli.text import parse_count
from zerostack.machine import environment_of_each


def run(capsys, *arguments):
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("command", ["run", "demo", "doctor", "explain", "estimate"])
def test_help_shows_examples(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert "examples:" in out
    assert f"zerostack {command}" in out


def test_help_of_all(capsys):
    for arguments in ([], ["--help"]):
        status, out, _ = run(capsys, *arguments)
        assert status == 0
        assert all(
            command in out for command in ("run", "demo", "doctor", "explain", "estimate", "examples:")
        )
    assert run(capsys, "--version")[1].strip() == "0.1.0"
    status, _, err = run(capsys, "trian")
    assert status == 2
    assert "invalid choice: 'trian'" in err


def test_estimate_gives_the_numbers_of_the_paper(capsys, tmp_path):
    chart = tmp_path / "deep" / "chart.png"
    arguments = ["--params", "7.5e9", "--world", "1,4,16,64", "--plot", str(chart)]
    status, out, _ = run(capsys, "estimate", *arguments)
    assert status == 0
    rows = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if line[:2] in {"0 ", "1 ", "2 ", "3 "}
    }
    last = {stage: f"{cells[-2]} {cells[-1]}" for stage, cells in list(rows.items())[:4]}
    assert chart.read_bytes().startswith(b"\x89PNG")
    table = out.split("What they are made of")[0]
    sizes = [line.split("  ")[-1].strip() for line in table.splitlines() if line[:1] in "0123" and line[:1]]
    assert sizes == ["120 GB", "31.4 GB", "16.6 GB", "1.88 GB"]
    assert last
    status, _, err = run(capsys, "estimate", "--params", "1B", "--optimizer", "adamm")
    assert status == 2
    assert "optimizer: expected one of" in err


def test_estimate_shows_tiers(capsys, tmp_path):
    asked = ["--offload-optimizer", "nvme", "--offload-param", "cpu", "--nvme-path", str(tmp_path)]
    status, out, _ = run(
        capsys, "estimate", "--params", "8e9", "--world", "4", "--ranks-per-machine", "2", *asked
    )
    assert status == 0
    rows = [line.split("  ") for line in out.split("Where they rest")[1].splitlines()]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert rows["0"][:3] == ["128 GB", "0 B", "0 B"]
    # Stage 3: 2 bytes a parameter on the host, 2 + 12 on the drive, over 4 ranks; beside them the window.
    assert rows["3"][0] == "0 B"
    assert rows["3"][2] == "28 GB"
    assert rows["3"][4] == "56 GB"
    assert f"Free at {tmp_path}: " in out
    status, _, err = run(capsys, "estimate", "--params", "1B", "--nvme-path", str(tmp_path))
    assert status == 2
    assert "nothing would rest there" in err
    status, _, err = run(
        capsys, "estimate", "--params", "1B", "--optimizer", "adam-amsgrad", "--offload-optimizer", "cpu"
    )
    assert status == 2
    assert "optimizer: expected one of adam, adamw" in err


def test_estimate_measures_this_machine(capsys, tmp_path):
    asked = ["--world", "4", "--ranks-per-machine", "2", "--stage", "0,3", "--offload-optimizer", "nvme"]
    asked += ["--nvme-path", str(tmp_path), "--measure"]
    status, out, err = run(capsys, "estimate", "--params", "1e6", *asked)
    assert (status, err) == (0, "")
    assert "at stage 0" not in out  # nothing of it rests elsewhere
    here = out.split("On this machine, at stage 3")[1]
    # 2 bytes of gradients and 12 of masters and moments for a quarter of the parameters.
    assert re.search(r"^ *nvme .* 3\.5\d* MB +7\.0\d* MB", here, re.MULTILINE)
    memory, reads = (float(re.search(rf"{of} (\S+) GB/s", here)[1]) for of in ("memory", "drive reads"))
    step, drive = map(float, re.search(r"optimizer step: (\S+) s \(drive (\S+),", here).groups())
    assert min(memory, reads) > 0
    assert step >= drive > 0
    assert list(tmp_path.iterdir()) == []


def test_estimate_refuses_what_does_not_fit_this_machine(capsys, tmp_path):
    asked = ["--world", "4", "--stage", "3", "--offload-optimizer", "nvme", "--measure"]
    status, out, err = run(capsys, "estimate", "--params", "1e18", *asked, "--nvme-path", str(tmp_path))
    assert status == 1
    assert "speeds: not measured" in out
    assert re.search(r"host memory: 4 rank\(s\) need \d+ bytes, and \d+ are free", err)
    taken = tmp_path / "file"
    taken.touch()
    status, _, err = run(capsys, "estimate", "--params", "1e6", *asked, "--nvme-path", str(taken))
    assert status == 1
    assert f"{taken} is not a folder" in err
    status, _, err = run(capsys, "estimate", "--params", "1e6", *asked)
    assert status == 2
    assert "--measure: give --nvme-path" in err
    status, _, err = run(capsys, "estimate", "--params", "1e6", "--measure")
    assert status == 2
    assert "nothing is offloaded" in err


@pytest.mark.parametrize(
    ("text", "value"), [("7.5e9", 7.5e9), ("350M", 350e6), ("1.3b", 1.3e9), ("2K", 2000)]
)
def test_counts_may_have_units(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["-1M", "0", "0.5", "inf", "nan", "many", ""])
def test_counts_are_numbers_from_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number such as"):
        parse_count(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("estimate", "--params", "abc"),
            "--params: expected a number such as 7.5e9, 350M or 1.3B, got 'abc'",
        ),
        (("estimate", "--params", "1B", "--world", "1,,2"), "--world: expected whole numbers such as 1,4,16"),
        (("estimate", "--params", "1B", "--plot", "memory.xyz"), "--plot: expected a file name that ends in"),
        (("run", "--num-procs", "0", "train.py"), "--num-procs: expected at least 1, got 0"),
        (("run", "--num-procs", "some", "train.py"), "--num-procs:"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err


def test_explain_shows_value_source_and_bytes(capsys, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(
            {
                "train_batch_size": 32,
                "train_micro_batch_size_per_gpu": 2,
                "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
                "bf16": {"enabled": True},
                "zero_optimization": {
                    "stage": 2,
                    "contiguous_gradients": True,
                    "zero_quantized_weights": False,
                    "legacy_stage1": False,
                },
            }
        )
    )
    status, out, _ = run(capsys, "explain", str(path), "--params", "1e9", "--world", "4")
    assert status == 0
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert "train_batch_size 32 file" in words
    assert (
        "gradient_accumulation_steps 4 derived: train_batch_size 32 / (train_micro_batch_size_per_gpu 2 x ranks 4)"
        in words
    )
    assert "gradient_clipping 0.0 default" in words
    assert "optimizer.params.lr auto auto: from the optimizer or args.learning_rate, at initialize()" in words
    assert any(line.startswith("zero_optimization.contiguous_gradients gradients always") for line in words)
    assert any(line.startswith("zero_optimization.legacy_stage1 would be refused") for line in words)
    assert "params 2 GB" in words
    assert "optimizer 2 GB" in words
    assert "total 5.5 GB" in words


def test_errors_are_one_line_without_a_traceback(capsys, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 1, "zero_optimization": {"stagee": 3}}')
    status, out, err = run(capsys, "explain", str(path))
    assert (status, out) == (2, "")
    assert err == "zerostack explain: error: zero_optimization.stagee: unknown key; did you mean 'stage'?\n"


def test_doctor_reports_this_machine_and_measures(capsys):
    status, out, _ = run(capsys, "doctor", "--max-mb", "1")
    assert status == 0
    for words in (
        "processor",
        "bf16 on the CPU",
        "comm-compress",
        "torch",
        "adam_step",
        "all_reduce GB/s",
        "1.05 MB",
    ):
        assert words in out


def test_processes_share_the_cores_and_what_is_set_stays(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shares = [int(environment_of_each(procs)["OMP_NUM_THREADS"]) for procs in (1, 2, 100_000)]
    assert shares[0] >= shares[1] >= shares[2] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "5")
    assert not {"OMP_NUM_THREADS", "MALLOC_MMAP_MAX_"} & environment_of_each(2).keys()


def test_run_starts_a_script_on_every_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, sys
            import torch, torch.distributed as dist
            import zerostack
            zerostack.init_distributed()
            total = torch.tensor([dist.get_rank() + 1])
            dist.all_reduce(total)
            text = f"{total.item()} {os.environ['OMP_NUM_THREADS']} {sys.argv[1:]}"
            pathlib.Path(sys.argv[1], f"rank{dist.get_rank()}").write_text(text)
            dist.destroy_process_group()  # or gloo's thread may free the tensor after the interpreter
            """
        )
    )
    command = [
        sys.executable,
        "-m",
        "zerostack",
        "run",
        "--num-procs",
        "2",
        str(script),
        str(tmp_path),
        "--flag",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    threads = {**environment_of_each(2), **os.environ}["OMP_NUM_THREADS"]
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == f"3 {threads} ['{tmp_path}', '--flag']"
