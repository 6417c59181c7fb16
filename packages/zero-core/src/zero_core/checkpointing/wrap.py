"""`checkpoint` and `checkpoint_modules`: one call under a checkpoint, or every call of some modules.

A module is wrapped by a `forward` of its own, in the instance's `__dict__`: its hooks run outside of the checkpoint,
once in forward, and not again when the forward is recomputed. So a unit of stage 3 is gathered by its module's hooks as
usual, and is whole when its recomputation begins: the hook on the module's outputs has gathered it for the backward.
Modules inside a checkpoint run with their hooks again, and gather what they need.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable
from types import MethodType, TracebackType
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import ZeroConfigError, ZeroStateError
from ..units import select_modules
from .policy import CheckpointPolicy

ResultT = TypeVar("ResultT")
ModuleChoice = type[nn.Module] | Iterable[type[nn.Module]] | Callable[[str, nn.Module], bool]


def checkpoint(
    fn: Callable[..., ResultT], *args: Any, policy: CheckpointPolicy | None = None, **kwargs: Any
) -> ResultT:
    """Call `fn(*args, **kwargs)` and forget what its backward needs: it is computed again then.

    Where gradients are not recorded this is the plain call. Random state and autocast are restored for the second run,
    which ends as soon as it has computed what is needed. `fn` must do the same again: no side effects, no change of its
    inputs in place. Under `partition` every rank of the group must call it, and run its backward.

    Args:
        fn: any function or module.
        args: its arguments; tensors in nested tuples, lists and dicts are found.
        policy: what is kept, and where; None keeps the inputs as they are. Give all calls one object: buffers belong to
            it.
        kwargs: likewise.

    Returns:
        What `fn` returns.

    Raises:
        ZeroStateError: the policy's buffer is full, or ranks that should hold the same inputs do not.
        CollectiveError: in backward, a rank did not come to gather a partitioned input.

    Bytes until backward: the inputs' (under `partition` 1/N of them on each of N ranks, padded to N elements), and the
    outputs of `save_ops`. On the wire, under `partition`: the inputs once in backward.
    Source: see `CheckpointPolicy`.
    """
    if not torch.is_grad_enabled():
        return fn(*args, **kwargs)
    name = getattr(fn, "__qualname__", type(fn).__name__)
    policy = policy or CheckpointPolicy()
    region, saved = policy.keeper.region(fn, args, kwargs, name)
    result: ResultT = _run(region, saved, policy)
    return result


def checkpoint_modules(
    model: nn.Module, classes: ModuleChoice, policy: CheckpointPolicy | None = None
) -> CheckpointHandle:
    """Put every call of some modules of `model` under a checkpoint, until the handle is closed.

    Without recorded gradients, in `eval()` mode, and where neither an input nor a parameter of the module needs a
    gradient, the module runs as it did before. May be called before or after `shard`. No communication.

    Args:
        model: any module; itself not a candidate.
        classes: module classes, or a predicate `(name, module) -> bool`. Modules may lie in one another.
        policy: what is kept, and where; None keeps the inputs as they are.

    Returns:
        A handle with `close()`; also a context manager.

    Raises:
        ZeroConfigError: nothing matches, or a module is under a checkpoint already, or was compiled as a whole (compile
            its `forward`, before); nothing was changed.

    Bytes: see `checkpoint`.
    """
    chosen = select_modules(model, classes, "classes")
    for name, module in chosen.items():
        if getattr(module, "_compiled_call_impl", None) is not None or name.endswith("_orig_mod"):
            raise ZeroConfigError(
                f"checkpoint_modules: module '{name}' ({type(module).__name__}) is compiled with its hooks, and would "
                "run uncompiled under the checkpoint; compile its forward instead: module.forward = "
                "torch.compile(module.forward), before checkpoint_modules"
            )
        if isinstance(module.__dict__.get("forward"), CheckpointedForward):
            raise ZeroConfigError(
                f"checkpoint_modules: module '{name}' ({type(module).__name__}) is under a checkpoint already; close "
                "that handle first, or choose other modules"
            )
    policy = policy or CheckpointPolicy()
    handle = CheckpointHandle(policy)
    for name, module in chosen.items():
        forward = CheckpointedForward(module, name, policy)
        module.__dict__["forward"] = forward
        handle.forwards[name] = forward
    return handle


class CheckpointHandle:
    """Modules under checkpoints, to be undone by `close`.

    Attributes:
        forwards: name -> what the module's `forward` is meanwhile.
    """

    def __init__(self, policy: CheckpointPolicy) -> None:
        self.policy = policy
        self.forwards: dict[str, CheckpointedForward] = {}

    def close(self) -> None:
        """Give the modules their own `forward` back, and idle buffers to the system; graphs made so far stay valid.

        Raises:
            ZeroStateError: something has replaced the `forward` of a module since; the other modules are restored.
        """
        replaced = [name for name, forward in self.forwards.items() if not forward.remove()]
        self.forwards.clear()
        self.policy.keeper.trim()
        if replaced:
            raise ZeroStateError(
                f"CheckpointHandle.close: the forward of {', '.join(map(repr, replaced))} was replaced after "
                "checkpoint_modules, and still leads through the checkpoint; undo in reverse order"
            )

    def __enter__(self) -> CheckpointHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CheckpointedForward:
    """What a module's `forward` is while it is under a checkpoint.

    Attributes:
        name: of the module, for messages and tables.
        plan: makes the region of a call; `profile` looks over its shoulder.
    """

    def __init__(self, module: nn.Module, name: str, policy: CheckpointPolicy) -> None:
        self.name = name
        self.policy = policy
        self.plan = policy.keeper.region
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")
        self._module = weakref.ref(module)  # it holds us: a cycle would outlive the model
        self.__signature__ = inspect.signature(self.original)
        self._uncompiled = torch.compiler.disable(type(self)._call)  # not ours: that would be a cycle

    @property
    def module(self) -> nn.Module:
        """The module."""
        module = self._module()
        assert module is not None
        return module

    @property
    def original(self) -> Callable[..., Any]:
        """The module's `forward` without us."""
        return MethodType(type(self.module).forward, self.module) if self.own is None else self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, under a checkpoint where there will be a backward."""
        return self._uncompiled(self, *args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not self.module.training or not self._needs_grad(args, kwargs):
            return self.original(*args, **kwargs)
        region, saved = self.plan(self.original, args, kwargs, self.name)
        return _run(region, saved, self.policy)

    def remove(self) -> bool:
        """Give the module its own forward back; False if something else is in our place."""
        module = self._module()
        if module is None:
            return True
        if module.__dict__.get("forward") is not self:
            return False
        if self.own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = self.own
        return True

    def _needs_grad(self, args: Any, kwargs: Any) -> bool:
        leaves = tree_leaves((args, kwargs))
        return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves) or any(
            param.requires_grad for param in self.module.parameters()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointedForward:
        """A copied module is under a checkpoint of the same policy; the handle does not know it."""
        copied = CheckpointedForward(memo[id(self.module)], self.name, self.policy)
        copied.own = copy.deepcopy(self.own, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse: process groups and buffers cannot be saved."""
        raise ZeroStateError(
            f"pickle of module '{self.name}' under a checkpoint: close the handle of checkpoint_modules first, or save "
            "the state_dict"
        )


def _run(region: Callable[..., Any], saved: list[torch.Tensor], policy: CheckpointPolicy) -> Any:
    return recompute(region, *saved, use_reentrant=False, preserve_rng_state=policy.preserve_rng)
