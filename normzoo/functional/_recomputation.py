"""Forward passes that autograd repeats inside a backward pass, as activation checkpointing does.

A recomputation must leave statistics alone, which the first pass has moved, and must be the function that the first
pass was: what a layer read of its running statistics then is kept here, and read again in the recomputation.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# First passes of a layer that are remembered, whether or not they will be recomputed; the graph may keep older ones.
LIMIT = 64
# Relative difference of a channel's summary between a first pass and its recomputation: some GPU kernels vary.
TOLERANCE = 1e-3


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass inside it is a recomputation and moves no statistics.

    A compiled forward pass does not tell; it moves statistics wherever it runs.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def replay(statistics: Tensor) -> FirstPass | Recomputation | None:
    """What a forward pass that reads running statistics has to do for its recomputation; None if there will be none.

    The result is called once, as ``read = replay(key, *read)``, where ``read`` are tensors that depend on the running
    statistics, and ``key`` is a summary of the input: one positive value for each channel. A first pass keeps them; a
    recomputation gets those of the first pass that had the nearest key. Nothing is copied to the host. The context of
    the layer's autograd function should hold the result, which is then remembered as long as the graph exists.

    Args:
        statistics: one of the layer's buffers, which stands for the layer.
    """
    if torch._C._current_graph_task_id() != -1:
        history = _histories.get(statistics)
        return None if history is None else history.recomputation()
    hooks, with_graph = torch._C._autograd._top_saved_tensors_default_hooks(False), torch.is_grad_enabled()
    # checkpoints run the first pass without gradient (reentrant), or under hooks for saved tensors
    if (hooks is None and with_graph) or torch.is_inference_mode_enabled():
        return None
    if statistics not in _histories:
        _histories[statistics] = _History()
    return FirstPass(_histories[statistics], hooks, with_graph)


class FirstPass:
    """A forward pass that may be recomputed: what it read of running statistics, and the summary of its input.

    Attributes:
        number: autograd's sequence number at the time, which orders passes and nodes of the graph.
        region: tells the checkpoint under whose hooks it ran from others; None without hooks.
        with_graph: whether gradients were enabled.
    """

    def __init__(self, history: _History, hooks: Any, with_graph: bool) -> None:
        self.number: int = torch._C._autograd._get_sequence_nr()
        self.region, self.with_graph = _region(hooks), with_graph
        self.key: Tensor | None = None
        self.read: tuple[Tensor, ...] = ()
        self._history = weakref.ref(history)
        # a checkpoint's function lives as long as a tensor that was saved under its hooks
        self._hook = weakref.ref(hooks[1]) if with_graph and isinstance(hooks[1], FunctionType) else None

    def __call__(self, key: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
        """Keep copies of what was read, and return what was read."""
        self.key, self.read = key.detach().clone(), tuple(t.detach().clone() for t in read)
        history = self._history()
        if history is not None:
            history.append(self)
        return read

    @property
    def over(self) -> bool:
        """Whether nothing is left that could be recomputed."""
        return self._hook is not None and self._hook() is None


class Recomputation:
    """A forward pass inside a backward pass, and the first passes that it may repeat, the likeliest one first."""

    def __init__(self, passes: list[FirstPass]) -> None:
        self.passes = passes

    def __call__(self, key: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
        """What the first pass with the nearest key read, or ``read`` if there is none within the tolerance."""
        fitting = [p for p in self.passes if _alike((p.key, *p.read), (key, *read))]
        if not fitting:
            return read
        keys = torch.stack([p.key.flatten() for p in fitting if p.key is not None])
        own = key.detach().flatten()
        difference = (keys - own).abs().div_(own.clamp(min=torch.finfo(own.dtype).tiny)).amax(1)
        difference = difference.nan_to_num_(nan=torch.inf)
        nearest = difference.argmin(0, keepdim=True)  # the first one of several
        near = difference.index_select(0, nearest) <= TOLERANCE
        of_first = (torch.stack(t).index_select(0, nearest)[0] for t in zip(*(p.read for p in fitting), strict=True))
        return tuple(torch.where(near, old, new) for old, new in zip(of_first, read, strict=True))


class _History:
    """The first passes of one layer that may still be recomputed."""

    def __init__(self) -> None:
        self._recent: deque[FirstPass] = deque()
        self._passes: list[weakref.ref[FirstPass]] = []  # the recent ones, and those that their graph holds
        self._dropped: tuple[int, int] | None = None  # thread and number of the last one without a graph
        self._run: Any = None
        self._calls = 0

    def append(self, first: FirstPass) -> None:
        self._recent = deque(p for p in self._recent if not p.over)
        self._recent.append(first)
        if len(self._recent) > LIMIT and not (oldest := self._recent.popleft()).with_graph:
            self._dropped = threading.get_ident(), oldest.number
        self._passes = [ref for ref in self._passes if ref() is not None]
        self._passes.append(weakref.ref(first))

    def recomputation(self) -> Recomputation:
        """Sort the passes for the recomputation that is running.

        Only the order among passes of equal input matters. A reentrant checkpoint's node is older than the passes of
        its region; the node that makes another checkpoint recompute is the last one of its region, or near it. Within a
        region passes are recomputed in their order.
        """
        node, hooks = torch._C._current_autograd_node(), torch._C._autograd._top_saved_tensors_default_hooks(False)
        number = -1 if node is None else node._sequence_nr()
        passes = [first for ref in self._passes if (first := ref()) is not None]
        if hooks is None:
            self._refuse_if_dropped(number)
            of_region = [p for p in passes if p.number > number and not p.with_graph]
        else:
            before = [p for p in passes if p.number <= number and p.with_graph]
            of_region = [p for p in before if p.region == before[-1].region]
        run = torch._C._current_graph_task_id(), number, _region(hooks)
        self._calls = self._calls + 1 if run == self._run else 0
        self._run = run
        cut = self._calls % max(len(of_region), 1)
        others = [p for p in reversed(passes) if p not in of_region]
        return Recomputation([*of_region[cut:], *of_region[:cut], *others])

    def _refuse_if_dropped(self, number: int) -> None:
        """Raise if what this recomputation needs may have been dropped; numbers of two threads do not compare.

        On a GPU the backward pass runs in a thread of autograd's, so that a recomputation whose first pass was dropped
        is not noticed there: it gets what a remembered pass of like input read, or else the statistics as they are now.
        """
        if self._dropped is not None and self._dropped[0] == threading.get_ident() and self._dropped[1] > number:
            raise RuntimeError(
                f"a reentrant checkpoint recomputes a layer with running statistics that was called more than {LIMIT} "
                "times since, and the statistics of its first calls were dropped; use checkpoint(use_reentrant=False)"
            )


_histories = WeakTensorKeyDictionary()


def _region(hooks: Any) -> int | None:
    return None if hooks is None else id(hooks[1])


def _alike(some: tuple[Tensor | None, ...], others: tuple[Tensor, ...]) -> bool:
    return len(some) == len(others) and all(
        a is not None and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        for a, b in zip(some, others, strict=True)
    )
