"""`LLM`: a model that completes texts, in ten lines; and `build_engine`, which the server uses, too.

In: a local model directory or a transformers module, and an `EngineConfig`. Out: completions.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm.auto import tqdm

from .adapters import Adapters
from .config import EngineConfig, Schedule
from .engine import Engine
from .errors import ConfigError, ModelError
from .kv_cache import KVCache, build_cache
from .output import Output, TokenLogprobs
from .parallel import TensorParallel
from .replays import Replays
from .request import FinishReason, SamplingParams
from .runner import Runner
from .scheduler import Scheduler
from .speculation import DraftModel, Guesser, PromptLookup
from .weights import LoadedModel, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_MOST_BUDGET = 2048
_MEASURED_LEN = 512


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt.

    Attributes:
        index: 0 to n - 1.
        finish_reason: why it ended.
        logprobs: of `token_ids`, if asked for.
    """

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Generation:
    """A prompt and its completions.

    Attributes:
        prompt_logprobs: of `prompt_ids`, if asked for.
        num_cached_tokens: of the prompt, which the prefix cache had.
    """

    prompt_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Of the first completion."""
        return self.completions[0].text


class LLM:
    """A model that completes prompts, many at once.

    Args:
        model: a local Hugging Face directory, or a transformers causal LM.
        config: how the engine runs.
        tokenizer: where it is not the directory's; needed beside a module.
        group: ranks that share each layer (tensor parallelism); every one of them makes the same calls.

    Raises:
        ModelError, CacheError, ConfigError: as `build_engine`; `gap_s` with several ranks, whose clocks differ.

    Example:
        >>> llm = LLM("path/to/model")  # doctest: +SKIP
        >>> llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        config: EngineConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        group: dist.ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        if config is not None and config.schedule.gap_s is not None and TensorParallel(group).size > 1:
            raise ConfigError(
                "SchedulePolicy(gap_s=...): expected None with ranks that step by themselves: each would go by its own "
                "clock; use fastgen.ranks.lead, whose rank 0 decides for all"
            )
        self.engine = build_engine(model, config, tokenizer=tokenizer, group=group)
        self.tokenizer = self.engine.tokenizer
        self._num_requests = 0

    def generate(
        self,
        prompts: str | list[int] | Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        progress: bool = True,
    ) -> list[Generation]:
        """Complete prompts; in their order.

        Args:
            prompts: one or many, as texts or token ids.
            params: for all, or for each.
            adapter: name of a LoRA adapter that `load_adapter` has loaded.
            progress: show a bar.

        Raises:
            RequestError: a prompt cannot be served; none is then.
        """
        batch = _as_list(prompts)
        each = [params or SamplingParams()] * len(batch) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(batch):
            raise ConfigError(f"params: expected one for each of {len(batch)} prompts, got {len(each)}")
        ids = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in batch]
        numbered = enumerate(zip(ids, each, strict=True), self._num_requests)
        jobs = {f"generate-{number}": job for number, job in numbered}
        self._num_requests += len(jobs)
        for prompt_ids, own in jobs.values():
            self.engine.check(prompt_ids, own, adapter=adapter)
        try:
            return self._run(jobs, adapter, progress)
        except BaseException:
            for name in jobs:
                self.engine.abort(name)
            raise

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Load a LoRA adapter (PEFT's format) that `generate` may choose by name."""
        self.engine.load_adapter(name, str(directory))

    def unload_adapter(self, name: str) -> None:
        """Forget a LoRA adapter; its name may be given to another."""
        self.engine.unload_adapter(name)

    def _run(
        self, jobs: dict[str, tuple[list[int], SamplingParams]], adapter: str | None, progress: bool
    ) -> list[Generation]:
        """Step until all of these (by name) have ended."""
        told: dict[str, list[Output]] = {name: [] for name in jobs}
        going = {name: params.n for name, (_, params) in jobs.items()}
        to_add = deque(jobs)
        with tqdm(total=len(jobs), unit="prompt", disable=not progress) as bar:
            generated = 0
            while going:
                self._add_some(to_add, jobs, adapter)
                for output in self.engine.step():
                    if output.request_id not in told:
                        continue
                    told[output.request_id].append(output)
                    generated += len(output.new_token_ids)
                    if output.finish_reason is not None:
                        going[output.request_id] -= 1
                        if not going[output.request_id]:
                            del going[output.request_id]
                            bar.update()
                seconds = bar.format_dict["elapsed"]
                bar.set_postfix_str(f"{generated / seconds:.0f} tokens/s" if seconds else "", refresh=False)
        return [_gathered(outputs, jobs[name][0]) for name, outputs in told.items()]

    def _add_some(
        self, names: deque[str], jobs: dict[str, tuple[list[int], SamplingParams]], adapter: str | None
    ) -> None:
        """Queue the next ones, as long as the queue has room."""
        while names and not self.engine.scheduler.is_full:
            name = names.popleft()
            prompt_ids, params = jobs[name]
            self.engine.add(name, prompt_ids, params, adapter=adapter)


def build_engine(
    model: str | Path | nn.Module,
    config: EngineConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Engine:
    """Load a model, size its cache, measure its token budget; see `LLM` for the arguments.

    Raises:
        ModelError: the model is incomplete, damaged or unknown.
        CacheError: there is no memory for the cache.
        ConfigError: a setting does not fit the model.
    """
    config = config or EngineConfig()
    tokenizer = tokenizer or _tokenizer(model)
    loaded = load_model(model, config, group=group)
    parallel = TensorParallel(group)
    text_config = loaded.hf_config.get_text_config()
    most = config.schedule.token_budget or max(_MOST_BUDGET, config.schedule.prompt_fill or 0)
    if config.cache.dtype not in (None, torch.int8, loaded.dtype):
        raise ConfigError(
            f"CachePolicy(dtype=...): expected torch.int8, the model's {loaded.dtype} or None, got {config.cache.dtype}"
        )
    speculation = config.speculation
    # Of each sequence's last token and its drafts; and as many of prompts whose log-probabilities are asked for.
    num_logits = config.schedule.max_sequences * (2 + (speculation.num_drafts if speculation else 0))
    small = _draft_model(config, loaded)
    small_layout = small.decoder.cache_layout(config.cache.dtype) if small else None
    cache = build_cache(
        loaded.decoder.cache_layout(config.cache.dtype),
        config.cache,
        loaded.device,
        activation_bytes=loaded.decoder.activation_bytes(most, min(most, num_logits)),
        max_blocks=config.schedule.max_sequences * -(-loaded.max_model_len // config.cache.block_size),
        beside=small_layout,
        parallel=parallel,
    )
    max_model_len = _held_len(loaded.max_model_len, cache)
    guesser: Guesser | None = None
    if speculation is not None and small is not None and small_layout is not None:
        own = KVCache(small_layout, cache.num_blocks, cache.block_size, small.device, cache.num_host_blocks)
        guesser = DraftModel(small.decoder, own, speculation.num_drafts, small.device, max_model_len)
    elif speculation is not None:
        guesser = PromptLookup(speculation.ngram, speculation.num_drafts)
    replays: Replays | None = None
    if config.replay and loaded.decoder.replayable:
        replays = Replays(loaded.decoder, cache, loaded.device, max_model_len)
    runner = Runner(loaded.decoder, cache, loaded.device, guesser, replays, parallel)
    if config.schedule.token_budget is None:
        longest = min(max_model_len, _MEASURED_LEN)
        fill = config.schedule.prompt_fill or runner.saturation_tokens(_MOST_BUDGET, longest, parallel.least)
        filled = fill if config.schedule.kind is Schedule.SPLIT_FUSE else None
        budget = max(fill, min(config.schedule.max_sequences + 1, _MOST_BUDGET))
        config = replace(config, schedule=replace(config.schedule, token_budget=budget, prompt_fill=filled))
    scheduler = Scheduler(
        config.schedule,
        cache.num_blocks,
        cache.block_size,
        max_model_len=max_model_len,
        prefix=config.cache.prefix,
        num_host_blocks=cache.num_host_blocks,
    )
    return Engine(
        runner,
        scheduler,
        tokenizer,
        vocab_size=text_config.vocab_size,
        eos_ids=_eos_ids(model, loaded, tokenizer),
        model_name=Path(model).resolve().name if isinstance(model, (str, Path)) else type(model).__name__,
        seed=config.seed,
        adapters=Adapters(loaded),
    )


def _held_len(max_model_len: int, cache: KVCache) -> int:
    """Tokens of the longest sequence that the cache can hold."""
    held = cache.num_blocks * cache.block_size
    if held < max_model_len:
        logger.warning(
            "expected a KV cache for the model's %d tokens, got one of %d: longer sequences are not served; give the "
            "cache more memory, or set max_model_len=%d",
            max_model_len,
            held,
            held,
        )
    return min(held, max_model_len)


def _draft_model(config: EngineConfig, loaded: LoadedModel) -> LoadedModel | None:
    """The smaller model that guesses, if one does."""
    if config.speculation is None or config.speculation.draft_model is None:
        return None
    small = load_model(config.speculation.draft_model, replace(config, max_model_len=loaded.max_model_len))
    sizes = [each.hf_config.get_text_config().vocab_size for each in (loaded, small)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"Speculation(draft_model=...): expected a model with the same {sizes[0]} tokens, got {sizes[1]}"
        )
    return small


def _tokenizer(model: str | Path | nn.Module) -> PreTrainedTokenizerBase:
    if isinstance(model, nn.Module):
        raise ConfigError("tokenizer: expected one beside a module, got none; give LLM(model, tokenizer=...)")
    if not Path(model).is_dir():
        raise ModelError(f"{model}: expected a local model directory, got none of this name")
    from transformers import AutoTokenizer  # slow to import

    try:
        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # it reads the config, too, whose checks raise what they like
        told = " ".join(str(error).split())
        raise ModelError(f"{model}: expected a tokenizer and its model's config, got {told}") from error
    return made


def _eos_ids(
    model: str | Path | nn.Module, loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Of the config, the generation config and the tokenizer: all of them end a sequence."""
    configs: list[Any] = [loaded.hf_config, getattr(model, "generation_config", None)]
    if isinstance(model, (str, Path)) and (Path(model) / "generation_config.json").is_file():
        from transformers import GenerationConfig

        try:
            configs.append(GenerationConfig.from_pretrained(model, local_files_only=True))
        except Exception as error:  # it has checks of its own, which raise what they like
            raise ModelError(
                f"{model}/generation_config.json: expected a generation config, got {error}"
            ) from error
    found: list[int] = []
    for each in [*(getattr(config, "eos_token_id", None) for config in configs), tokenizer.eos_token_id]:
        found += [each] if isinstance(each, int) else list(each or ())
    return tuple(dict.fromkeys(found))


def _as_list(prompts: str | list[int] | Sequence[str | list[int]]) -> list[str | list[int]]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _gathered(outputs: list[Output], prompt_ids: list[int]) -> Generation:
    by_index: dict[int, list[Output]] = {}
    for output in outputs:
        by_index.setdefault(output.index, []).append(output)
    completions = []
    for index, own in sorted(by_index.items()):
        reason = own[-1].finish_reason
        assert reason is not None  # it has ended
        logprobs = [each for output in own for each in output.logprobs or ()]
        completions.append(
            Completion(
                index,
                [token for output in own for token in output.new_token_ids],
                "".join(output.text for output in own),
                reason,
                logprobs if own[0].logprobs is not None else None,
            )
        )
    prompt_logprobs = next(
        (each.prompt_logprobs for each in outputs if each.prompt_logprobs is not None), None
    )
    return Generation(prompt_ids, completions, prompt_logprobs, outputs[0].num_cached_tokens)
