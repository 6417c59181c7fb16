"""Serve Hugging Face models: paged KV cache, Dynamic SplitFuse, an OpenAI-compatible server.

Modules, in the order in which a request passes through them:

- ``request``, ``config``: what is asked, and how the engine runs.
- ``scheduler`` with ``groups``, ``admission``, ``packing``: which sequences take part in the next forward;
  ``block_tables`` over ``blocks`` and ``prefix``: where their keys and values lie. No tensors.
- ``step_plan`` -> ``batch``: one forward, as data and as tensors.
- ``runner``: the forward; ``kv_cache``, ``attention``, ``models``, ``linear``, ``parallel``, ``adapters``.
- ``checkpoint`` -> ``fill`` with ``huge_pages`` -> ``weights``: models from directories and modules.
- ``choices`` -> ``sampler`` with ``grammar`` and ``seen``; ``beam_step`` with ``beams``: logits to tokens;
  ``speculation``: guesses.
- ``text``, ``lines``, ``jobs``: tokens to text, ends, and what is told of a request.
- ``engine``: a step; ``output``: what it tells.
- ``llm``: completions in ten lines; ``ranks``: an engine over several processes; ``serve``: HTTP, the command line.
- ``errors``, ``version``.
"""

from .config import CachePolicy, EngineConfig, Schedule, SchedulePolicy, Speculation, Weights
from .engine import Engine
from .errors import CacheError, ConfigError, FastgenError, ModelError, OverloadedError, RequestError
from .llm import LLM, Completion, Generation, build_engine
from .output import Output, Stats, TokenLogprobs
from .request import FinishReason, SamplingParams
from .version import __version__

__all__ = [
    "LLM",
    "CacheError",
    "CachePolicy",
    "Completion",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "FastgenError",
    "FinishReason",
    "Generation",
    "ModelError",
    "Output",
    "OverloadedError",
    "RequestError",
    "SamplingParams",
    "Schedule",
    "SchedulePolicy",
    "Speculation",
    "Stats",
    "TokenLogprobs",
    "Weights",
    "__version__",
    "build_engine",
]
