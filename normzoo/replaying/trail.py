"""From where values of a pass come that are not finite, and the first module that they come out of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from normzoo.callbacks._run.facts import Run
from normzoo.callbacks._run.frames import module_tensors
from normzoo.callbacks._run.isolation import loss_of
from normzoo.functional._recomputation import in_backward
from normzoo.replaying.calls import OUTSIDE, Call, Watch, tensors_in
from normzoo.replaying.first_bad import (
    Merged,
    first_bad_gradient,
    first_bad_output,
    first_nonfinite,
    limit_of,
    tensors_by_path,
)
from normzoo.replaying.origins import Origin, Origins, all_finite


class Trail:
    """Where the values of a pass come from that are not finite, and which modules they go through."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.origins = Origins(lambda: (self.watch.module, in_backward()))
        aside = self.origins.paused
        self.watch = Watch(run, take=self._take, before=self._before, after=self._after, aside=aside)
        self.weights: list[str] = []
        self.inputs: list[str] = []
        self._of_calls: dict[tuple[Call, str], frozenset[int]] = {}
        self._of_loss: frozenset[int] = frozenset()

    def _before(self, arguments: Any) -> None:
        if not self.origins.active:
            self.origins.active = True
            own, tensors = dict(self.run.module.named_parameters()), module_tensors(self.run)
            parameters = {name: t for name, t in tensors.items() if name in own}
            buffers = {name: t for name, t in tensors.items() if name not in own}
            self.weights = self.origins.mark("weight", parameters, masks=False) + self.origins.mark("weight", buffers)
        args, kwargs = arguments
        self.inputs += self.origins.mark("input", tensors_by_path(kwargs.get("batch", args[0] if args else None)))

    def _take(self, call: Call, side: str, tensors: list[Tensor]) -> None:
        self._of_calls[call, side] = self.origins.of(tensors)

    def _after(self, output: Any) -> None:
        self._of_loss |= self.origins.of(tensors_in(loss_of(output)))

    def _origins_of(self, call: Call, side: str) -> frozenset[int]:
        return self._of_calls.get((call, side), frozenset())

    def first_nonfinite(
        self, merged: Sequence[Merged], loss_is_finite: bool, gradients: Mapping[str, Tensor]
    ) -> dict[str, Any] | None:
        """What is to tell of the first bad module, by the origins of the loss, or else of the gradients."""
        found: Call | Merged | None
        if not loss_is_finite:
            direction, wanted = "forward", self._of_loss
            found = first_nonfinite(self.watch.calls, self._origins_of, wanted)
            if found is not None:
                wanted &= self._of_calls[found, "output"]
            elif not wanted:
                found = first_bad_output(merged)
        elif bad := [g for g in gradients.values() if not all_finite(g)]:
            direction, wanted = "backward", self.origins.of(bad)
            found = None if wanted else first_bad_gradient(merged)
        else:
            return None
        operation = next((o for i in sorted(wanted) if (o := self.origins.origins[i]).kind == "operation"), None)
        if found is None and not wanted:
            return None
        name = found.name if found is not None else operation.module if operation is not None else OUTSIDE
        modules: dict[str, nn.Module] = {OUTSIDE: self.run.module, **self.run.named_modules()}
        return {
            "direction": direction,
            "kind": "nonfinite",
            "module": name,
            "class": type(modules[name]).__name__,
            **of_operation(operation),
            "times": None,
            "input_times": None,
            "depth": next((m.depth for m in merged if m.name == name), None),
            "input_nonfinite": bool(self.inputs),
            "weight_nonfinite": self.weights,
        }


def of_operation(operation: Origin | None) -> dict[str, Any]:
    """What is to tell of the operation that values come from, if one is known."""
    dtype = None if operation is None else operation.dtype
    return {
        "op": None if operation is None else operation.name,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "input_max": None if operation is None else operation.input_max,
        "limit": limit_of(dtype),
    }
