"""What modules are given and return in a training step, call by call, and the gradients of both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from normzoo.callbacks._run.facts import Run
from normzoo.callbacks._run.gradients import local_values
from normzoo.callbacks._run.modules import compiled_modules, scripted_modules
from normzoo.functional._recomputation import in_backward
from normzoo.functional.finite_moments import finite_moments, merge_finite_moments
from normzoo.replaying.nodes import NodeOwners

SIDES = ("input", "output", "gradient", "input gradient")
OUTSIDE = "training_step"  # where an operation is called that no module below the LightningModule calls


@dataclass(eq=False)
class Call:
    """One call of a module in a micro-batch.

    Attributes:
        name: of the module.
        module: that is called.
        micro_batch: the place of the micro-batch among those of the passes.
        number: the place of the call among those of the module in the micro-batch.
        depth: the place among the calls of the micro-batch, in the order in which they return; -1 until then.
        leaf: whether no other module is called inside.
        moments: packed moments (:func:`normzoo.functional.finite_moments.finite_moments`) by side; ``"gradient"`` is
            that of the output.
    """

    name: str
    module: nn.Module
    micro_batch: int
    number: int
    depth: int = -1
    leaf: bool = True
    moments: dict[str, Tensor] = field(default_factory=dict)
    _in_graph: bool = False  # whether gradients of the output will be seen


@dataclass(eq=False)
class _Entry:
    """A module whose forward runs; ``call`` is None if what is computed again is followed already."""

    name: str
    module: nn.Module
    call: Call | None


class Watch:
    """Follows the calls of all modules of a run while passes are made inside of the context.

    What activation checkpointing computes again is not another call; its gradients are those of the module's last call
    that had none. Calls inside of what ``torch.compile`` has made run uncompiled meanwhile. Modules that ``torch.jit``
    has made run no hooks, and metrics are not part of the network: neither is followed.

    Attributes:
        calls: those that have returned, in that order.
        micro_batch: the number of the present micro-batch, from 0; -1 before the first.

    Args:
        run: whose modules are followed.
        sides: among :data:`SIDES`, of which moments are taken.
        take: is called with each call, ``"input"`` or ``"output"``, and the tensors on that side.
        before: is called with the arguments of each ``training_step``.
        after: is called with what ``training_step`` returned.
        aside: makes a context in which all this is done.
        like: an earlier one of the same run, which has found out which modules there are.
    """

    def __init__(
        self,
        run: Run,
        sides: tuple[str, ...] = SIDES,
        take: Callable[[Call, str, list[Tensor]], None] | None = None,
        before: Callable[[Any], None] | None = None,
        after: Callable[[Any], None] | None = None,
        aside: Callable[[], AbstractContextManager[Any]] = nullcontext,
        like: Watch | None = None,
    ) -> None:
        self.run, self.sides, self._take, self._aside = run, frozenset(sides), take, aside
        self._before, self._after = before, after
        self.calls: list[Call] = []
        self.micro_batch = -1
        self._modules: dict[str, nn.Module] = _followed(run) if like is None else like._modules
        self._compiled: bool = bool(compiled_modules(run)) if like is None else like._compiled
        self._owners = NodeOwners()
        self._stack: list[_Entry] = []
        self._own: dict[str, list[Call]] = {}  # of the micro-batch, by module
        self._depth = 0
        self._handles: list[Any] = []
        self._exit = ExitStack()

    @property
    def module(self) -> str:
        """The innermost module whose forward or backward runs; after an error the one that raised it."""
        inside = self._stack[-1].name if self._stack else OUTSIDE
        return (self._owners.running() or inside) if in_backward() else inside

    def __enter__(self) -> Watch:
        if self._compiled:
            self._exit.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in self._modules.items():
            enter, leave = functools.partial(self._enter, name), functools.partial(self._leave, name)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, with_kwargs=True))
        self._exit.enter_context(_in_place_of_training_step(self.run.module, self._training_step))
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._exit.close()

    def _training_step(self, training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.micro_batch += 1
        self._own, self._stack, self._depth = {}, [], 0
        if self._before is not None:
            with self._aside():
                self._before((args, kwargs))
        output = training_step(*args, **kwargs)
        if self._after is not None:
            with self._aside():
                self._after(output)
        return output

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        tensors = floating(args, kwargs)
        self._owners.label(tensors, self._stack[-1].name if self._stack else OUTSIDE)
        own = self._own.setdefault(name, [])
        if in_backward():
            call = next((c for c in reversed(own) if not c._in_graph), None)
        else:
            call = Call(name, module, self.micro_batch, len(own))
            own.append(call)
            if self._stack and (outer := self._stack[-1].call) is not None:
                outer.leaf = False
            self._hear(call, "input", tensors)
        self._stack.append(_Entry(name, module, call))
        if call is not None:
            self._follow_gradients(call, "input gradient", tensors)

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        while self._stack and self._stack[-1].module is not module:
            self._stack.pop()  # its forward was left by an error that was caught
        call = self._stack.pop().call if self._stack else None
        tensors = floating(output)
        self._owners.label(tensors, name)
        if call is None:
            return
        if call.depth < 0:
            call.depth, self._depth = self._depth, self._depth + 1
            self.calls.append(call)
            self._hear(call, "output", tensors)
        call._in_graph |= self._follow_gradients(call, "gradient", tensors)

    def _hear(self, call: Call, side: str, tensors: list[Tensor]) -> None:
        if side in self.sides:
            self._add(call, side, tensors)
        if self._take is not None:
            with self._aside():
                self._take(call, side, tensors)

    def _add(self, call: Call, side: str, tensors: list[Tensor]) -> None:
        with self._aside(), torch.no_grad():
            found = [finite_moments(dense(t)).to(self.run.device) for t in tensors]
            found += [call.moments[side]] if side in call.moments else []
            if found:
                call.moments[side] = found[0] if len(found) == 1 else merge_finite_moments(torch.stack(found))

    def _follow_gradients(self, call: Call, side: str, tensors: list[Tensor]) -> bool:
        """Whether there will be gradients."""
        # The first pass of a reentrant checkpoint is made without a graph
        followed = [t for t in tensors if t.requires_grad] if torch.is_grad_enabled() else []
        if side in self.sides:
            # Hooks of the tensors as they are now: an operation in place that follows is not part of the module
            self._handles += [t.register_hook(lambda g: self._add(call, side, [g])) for t in followed]
        return bool(followed)


def floating(*values: Any) -> list[Tensor]:
    """The floating-point or complex tensors in some values; if there are none, the other tensors."""
    tensors = [t for t in tensors_in(values) if not t.is_meta]
    return [t for t in tensors if t.is_floating_point() or t.is_complex()] or tensors


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples, mappings and dataclasses, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inside in value.values():
            yield from tensors_in(inside)
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from tensors_in(inside)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in dataclasses.fields(value):
            yield from tensors_in(getattr(value, part.name, None))


def dense(t: Tensor) -> Tensor:
    """The values that this rank has of a tensor, of a sparse or nested one those that are stored."""
    t = local_values(t.detach())
    if t.layout == torch.sparse_coo:
        return t._values()
    return t if t.layout == torch.strided and not t.is_nested else t.values()


def _followed(run: Run) -> dict[str, nn.Module]:
    left_out = scripted_modules(run.module)
    for module in run.module.modules():
        if isinstance(module, Metric | MetricCollection):
            left_out |= {*module.modules()}
    return {name: module for name, module in run.named_modules().items() if module not in left_out}


@contextmanager
def _in_place_of_training_step(module: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """``training_step`` of a module calls a function, which is given the method and its arguments."""
    own, name = vars(module), "training_step"
    before, method = own.get(name), getattr(module, name)
    own[name] = functools.wraps(method)(functools.partial(instead, method))
    try:
        yield
    finally:
        own.pop(name, None)
        if before is not None:
            own[name] = before
