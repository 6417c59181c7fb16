"""DeepSpeed's five learning-rate schedules as `torch.optim.lr_scheduler.LRScheduler` subclasses.

In: an optimizer whose `param_groups` are live. Out: the rate (`OneCycle`: also the momentum) of each group.
`last_epoch` counts the optimizer steps that were taken. All formulas are closed forms of the step, so a
schedule resumes from its `state_dict()` alone.

Modules: `rates` (one value or one a group), `cycle` (range test, one cycle), `warmup` (three warm-ups).

Source: DeepSpeed's public API reference, "Learning Rate Schedulers"; L. Smith, arXiv:1803.09820.
"""

from .cycle import LRRangeTest, OneCycle
from .warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]
