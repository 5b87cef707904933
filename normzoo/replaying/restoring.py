"""Puts the state that a capsule holds into a module, its optimizers and a GradScaler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from normzoo.callbacks._run.facts import plain_name
from normzoo.callbacks._run.gradients import local_values
from normzoo.callbacks._run.ranks import is_sharded
from normzoo.capsules.tree import LeftOut
from normzoo.replaying.steps import ReplayError


@torch.no_grad()
def load_module(tensors: Mapping[str, Tensor], recorded: Any) -> None:
    """Copy the parameters and buffers of a snapshot into those of the module, by name.

    Raises:
        ReplayError: if the module has others, or others of these shapes.
    """
    if isinstance(recorded, LeftOut):
        raise ReplayError(f"the capsule has no weights: {recorded.reason}; give the Recorder more max_disk")
    for name in recorded:
        if name not in tensors:
            raise ReplayError(
                f"the capsule has a tensor {name!r}, and the module has none of this name; {_advice(tensors)}"
            )
    for name, own in tensors.items():
        if name not in recorded:
            raise ReplayError(
                f"the module has a tensor {name!r}, and the capsule has none of this name; {_advice(recorded)}"
            )
        value, local = recorded[name], local_values(own.detach())
        if isinstance(value, LeftOut):
            raise ReplayError(f"the capsule has no values of {name!r}: {value.reason}")
        if value.shape != local.shape:
            raise ReplayError(
                f"{name!r} has the shape {tuple(value.shape)} in the capsule and {tuple(local.shape)} in the module; "
                "make the module with the arguments that it had in the run"
            )
        local.copy_(value)


def load_optimizers(optimizers: Sequence[Optimizer], recorded: Any) -> None:
    """Load the states of a snapshot into the optimizers that the module has configured.

    Raises:
        ReplayError: if there are others, or their groups have other numbers of parameters.
    """
    if isinstance(recorded, LeftOut):
        raise ReplayError(f"the capsule has no states of the optimizers: {recorded.reason}")
    if len(recorded) != len(optimizers):
        raise ReplayError(
            f"the capsule has {len(recorded)} optimizers, and configure_optimizers returned {len(optimizers)}"
        )
    for place, (optimizer, state) in enumerate(zip(optimizers, recorded, strict=True)):
        sizes = [len(group["params"]) for group in state["param_groups"]]
        own = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != own:
            raise ReplayError(
                f"the groups of optimizer {place} have {sizes} parameters in the capsule and {own} in the module; "
                "make the module with the arguments that it had in the run"
            )
        optimizer.load_state_dict(_distributed(optimizer, state))


def _distributed(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with this rank's parts of sharded tensors as DTensors, as the optimizer keeps them."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, params, strict=True))
    states = {
        number: {key: _like(value, of[number]) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": states}


def _like(value: Any, p: Tensor) -> Any:
    if not (isinstance(value, Tensor) and is_sharded(p) and value.shape == local_values(p.detach()).shape):
        return value
    assert isinstance(p, DTensor)
    local = value.to(p.device)
    return DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride(), run_check=False)


def fit_of_optimizers(optimizers: Sequence[Optimizer], hyperparameters: Sequence[Sequence[Any]]) -> None:
    """Raise a ReplayError unless the hyperparameters of a step are those of as many optimizers and groups."""
    recorded, own = [len(groups) for groups in hyperparameters], [len(o.param_groups) for o in optimizers]
    if recorded != own:
        raise ReplayError(f"the optimizers have {recorded} parameter groups in the capsule and {own} in the module")


def load_scaler(scaler: Any, recorded: Any) -> None:
    """Load the state of a GradScaler, if the run has one."""
    state = recorded.get("scaler") if isinstance(recorded, Mapping) else None
    if scaler is not None and state:
        vars(scaler).update({k: v.to(scaler._device) if isinstance(v, Tensor) else v for k, v in state.items()})


def materialize(module: nn.Module, recorded: Any) -> None:
    """Give the parameters of lazy modules the shapes that they have in the capsule, and make them modules like others.

    Their first pass would otherwise do so, and a state from before it would not fit the module any more.
    """
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(t) and isinstance(recorded, Mapping) and isinstance(recorded.get(plain_name(name)), Tensor):
            t.materialize(recorded[plain_name(name)].shape)
    for m in module.modules():
        if isinstance(m, LazyModuleMixin) and hasattr(m, "_initialize_hook") and not m.has_uninitialized_params():
            for name in ("_initialize_hook", "_load_hook"):  # as LazyModuleMixin does after that pass
                getattr(m, name).remove()
                delattr(m, name)
            m.__class__ = m.cls_to_become or type(m)


def _advice(names: Mapping[str, Any]) -> str:
    first = ", ".join(list(names)[:3])
    return f"there are {first}, ...; make the module of the class and with the arguments that it had in the run"
