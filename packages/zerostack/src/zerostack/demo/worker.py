"""One process of the demo: `python -m zerostack.demo.worker STORE RANK WORLD SETTINGS`.

In: a file for the rendezvous and the settings. Out: the phases of `training`, in order, and an exit status.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from ..cli.text import complain, say
from ..engine import Engine
from ..errors import ZerostackError
from ..machine import bfloat16_pays
from . import report, text, training
from .export import serve_command
from .settings import CONTEXT, Settings, num_params
from .training import INTERRUPTED, Run, Stop


def main(arguments: list[str]) -> int:
    """Run one rank; returns the exit status."""
    stop = Stop()
    stop.install()
    store, rank, world, raw = arguments
    settings = Settings.from_json(raw)
    device = _join(store, int(rank), int(world))
    group = dist.group.WORLD
    assert group is not None
    bf16, why = bfloat16_pays(device)
    corpus = text.load(settings.text, CONTEXT)
    run = Run(settings=settings, corpus=corpus, group=group, device=device, bf16=bf16, stop=stop)
    if run.first:
        settings.out_dir.mkdir(parents=True, exist_ok=True)
        _introduce(run, why)
    try:
        return _phases(run)
    except ZerostackError as error:
        complain(f"zerostack demo: rank {rank}: {error}")
        return 2


def _join(store: str, rank: int, world: int) -> torch.device:
    """Meet the other ranks; returns this rank's device."""
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= world
    if cuda:
        torch.cuda.set_device(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=5),
    )
    return torch.device("cuda", rank) if cuda else torch.device("cpu")


def _introduce(run: Run, why: str) -> None:
    settings, size = run.settings, run.settings.model_config()
    dtype = "bfloat16" if run.bf16 else "fp32"
    text_mb = len(run.corpus.train) / 1e6
    say(
        f"A GPT of {num_params(size) / 1e6:.1f} M parameters ({size.layers} blocks, width {size.width}) learns "
        f"{text_mb:.1f} MB of text byte by byte: {run.corpus.origin}."
    )
    say(f"{settings.procs} process(es) on {run.device.type}, ZeRO stage {settings.stage}, {dtype}: {why}.")


def _phases(run: Run) -> int:
    settings = run.settings
    engine = training.build(run)
    if settings.resume:
        loaded, _ = engine.load_checkpoint(settings.checkpoints)
        run.losses = report.Losses.load(settings.losses, engine.global_steps)
        if run.first:
            say(f"Going on from {loaded}." if loaded else "Nothing to resume from: starting anew.")
    if engine.global_steps == 0 and settings.twin_steps:
        run.losses.ddp = training.train_twin(run, engine)
    elif engine.global_steps >= settings.steps and run.first:
        say(f"Already at step {engine.global_steps}; --steps {engine.global_steps + 300} would train on.")
    interrupted = training.train(run, engine)
    if not interrupted and engine.global_steps not in dict(run.losses.held_out):
        run.losses.held_out.append((engine.global_steps, training.held_out_loss(run, engine)))
    saved = training.save(run, engine)
    if run.first:
        title = f"{num_params(settings.model_config()) / 1e6:.1f} M parameters, ZeRO stage {settings.stage}"
        report.draw(run.losses, settings.out_dir / "loss.png", f"{title}, {settings.procs} processes")
    if interrupted:
        if run.first:
            say(f"\nStopped after step {engine.global_steps} of {settings.steps}; saved {saved}.")
        return INTERRUPTED
    _prove(run, engine, saved)
    return 0


def _prove(run: Run, engine: Engine, saved: str) -> None:
    """The tables and the text at the end; every rank takes part, the first one prints."""
    settings = run.settings
    first_step = engine.global_steps + 1
    training.export_model(run, engine)
    held = training.measure_held(run, engine)
    sample = training.generate(run, engine)
    uninterrupted, resumed = training.prove_resume(run, engine)
    if not run.first:
        return
    ours, ddp, kept = run.losses.ours, run.losses.ddp, run.losses.held_out[-1][1]
    if ours:
        say(f"\nLoss {ours[0]:.3f} -> {ours[-1]:.3f} nats a byte ({kept:.3f} on text kept apart).")
    if ddp:
        apart = [abs(a - b) for a, b in zip(ours, ddp, strict=False)]
        say(
            f"Plain DDP on the same start and data: losses at most {max(apart[:10]):.0e} apart in the first "
            f"{len(apart[:10])} steps, {max(apart):.0e} in {len(apart)}: roundings, which grow as training goes on."
        )
    say(f"\nWhat each rank held\n\n{held}\n")
    say(f"Resumed from {saved}\n")
    say(report.continuation_table(first_step, uninterrupted, resumed))
    say(f"\nWhat it writes now\n\n{sample}\n")
    (settings.out_dir / "sample.txt").write_text(sample, encoding="utf-8")
    say(f"Written to {settings.out}: loss.png, losses.json, sample.txt, checkpoints, model.")
    say(f"\nServe the model (OpenAI's API, and a page to try it):\n\n  {serve_command(settings.model)}")


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a peer may still be reading the last message; do not tear the group down under it
