"""All that a fit leaves behind, compared bit for bit."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.optim import Optimizer
from torch.optim import optimizer as global_step_hooks


def snapshot(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """All that a run leaves behind, in values that can be saved."""
    return {
        "weights": {k: p.detach().clone() for k, p in module.named_parameters()},
        "gradients": {k: None if p.grad is None else p.grad.clone() for k, p in module.named_parameters()},
        "buffers": {k: b.clone() for k, b in module.named_buffers()},
        "optimizer state": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "logged metrics": {k: v.clone() for k, v in trainer.callback_metrics.items()},
        "plain attributes": {k: _attributes(m) for k, m in module.named_modules()},
        "modes": {k: p.requires_grad for k, p in module.named_parameters()},
        "hooks": count_hooks(module, trainer.optimizers),
        "python stream": random.getstate(),
        "numpy stream": np.random.get_state(legacy=False),
        "torch stream": torch.get_rng_state(),
        "steps": (trainer.global_step, trainer.current_epoch, trainer.fit_loop.total_batch_idx),
        "stopped": trainer.should_stop,
    }


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Where two snapshots differ in a bit, a type or a key."""
    if type(a) is not type(b):
        yield f"{where}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, Mapping):
        yield from (f"{where}.{k}: only in one" for k in a.keys() ^ b.keys())
        for k in a:
            if k in b:
                yield from differences(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{where}: lengths {len(a)} and {len(b)}"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{where}.{i}")
    elif isinstance(a, np.ndarray):
        yield from differences(torch.from_numpy(a), torch.from_numpy(b), where)
    elif _bits(a) != _bits(b) if isinstance(a, Tensor | float) else a != b:
        yield f"{where}: {_text(a, b)}"


def difference_text(without: dict[str, Any], with_it: dict[str, Any]) -> str:
    """How many differences two snapshots have in which parts, and the first of them; empty if there are none."""
    found = [text.lstrip(".") for text in differences(without, with_it)]
    if not found:
        return ""
    parts = Counter(part for part in without for text in found if text.startswith(part))
    names = ", ".join(f"{part} ({number})" for part, number in parts.items())
    return f"there are differences in {names}; {found[0][:300]}"


def count_hooks(module: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, int]:
    """How many hooks there are, on modules and parameters, of optimizers, and for the whole process."""
    optimizers = list(optimizers)
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    counts = {
        f"{kind} hooks of modules": sum(len(getattr(m, f"_{kind}_hooks")) for m in module.modules()) for kind in kinds
    }
    counts["hooks of parameters"] = sum(
        len(getattr(p, name, None) or ())
        for p in module.parameters()
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
    )
    counts["hooks of all modules"] = sum(len(getattr(global_hooks, f"_global_{kind}_hooks")) for kind in kinds)
    for kind in ("pre", "post"):
        counts[f"{kind}-step hooks"] = sum(len(getattr(o, f"_optimizer_step_{kind}_hooks")) for o in optimizers)
        counts[f"{kind}-step hooks of all optimizers"] = len(
            getattr(global_step_hooks, f"_global_optimizer_{kind}_hooks")
        )
    return {name: count for name, count in counts.items() if count}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Its attributes other than parameters, buffers and modules; of objects only the class."""
    # What Lightning keeps by addresses while it trains is no state
    left_out = {"_parameters", "_buffers", "_modules", "_metric_attributes"}
    own = {k: v for k, v in vars(module).items() if k not in left_out}
    # Hooks are kept by numbers that the process counts
    return {k: _plain(list(v.values()) if "_hooks" in k else v) for k, v in own.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | deque):
        return [_plain(v) for v in value]
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value if isinstance(value, int | float | str | None) else type(value).__qualname__


def _text(a: Any, b: Any) -> str:
    if not isinstance(a, Tensor) or a.numel() == 1:
        return f"{a} and {b}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    return f"largest difference {(_local(a.detach()).double() - _local(b.detach()).double()).abs().max():.3g}"


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bits(value: Tensor | float) -> tuple[Any, ...]:
    """To compare also what is not a number, and the sign of zero."""
    t = torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else _local(value.detach())
    return t.dtype, t.shape, t.device, t.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
