"""Which layers the tools of torch and Lightning that look for torch's own batch norm pass over in a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normzoo.callbacks._run.facts import plain_name
from normzoo.callbacks._run.modules import makes_modules_later
from normzoo.recognition import FROZEN_KINDS
from normzoo.registry import layer_name, norm_info

Layers = Mapping[str, nn.Module]


class ToolNotice(Callback):
    """Says at the start of a fit what the Trainer's own tools do not do to layers of the zoo."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn, unless the module has yet to make its layers."""
        if stage == "fit" and not makes_modules_later(pl_module):
            self._warn(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of layers that ``configure_model`` has made."""
        if makes_modules_later(pl_module):
            self._warn(trainer, pl_module)

    def _warn(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        first = next((c for c in callbacks if isinstance(c, ToolNotice)), self)  # one says it for all of a Trainer
        for sentence in passed_over(trainer, pl_module) if first is self else ():
            rank_zero_warn(sentence)


def passed_over(trainer: Trainer, model: nn.Module) -> list[str]:
    """A sentence for each tool of a Trainer that acts on torch's batch norms only: on which layers it does not.

    Args:
        trainer: one of Lightning, or of ``normzoo.watch``.
        model: what it trains.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    sentences = [*_of_synchronization(trainer, model)]
    for callback in callbacks:
        classes = {c.__name__ for c in type(callback).__mro__}  # by name, for those of pytorch_lightning as well
        name = type(callback).__name__
        if "StochasticWeightAveraging" in classes:
            sentences += _of_averages(f"{name} recomputes running statistics of torch's batch norms only", model)
        elif "WeightAveraging" in classes and not getattr(callback, "_use_buffers", True):
            what = f"{name}(use_buffers=False) leaves running statistics to update_bn, which recomputes those"
            sentences += _of_averages(f"{what} of torch's batch norms only", model)
        elif "BaseFinetuning" in classes:
            sentences += _of_finetuning(name, model, "backbone." if "BackboneFinetuning" in classes else "")
    return sentences


def unsynchronized(model: nn.Module, ranks: int, asked: bool = False) -> list[str]:
    """Sentences on the layers that synchronization of torch's batch norms passes over, if there is any.

    Args:
        model: what is trained.
        ranks: how many processes train it.
        asked: whether the Trainer is to synchronize; else layers may have been converted by hand.
    """
    by_hand = ranks > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    what = "sync_batchnorm=True" if asked else "torch.nn.SyncBatchNorm.convert_sync_batchnorm"
    alone = {name: layer for name, layer in _layers(model).items() if not getattr(layer, "sync", False)}
    able = {name: layer for name, layer in alone.items() if "sync" in norm_info(layer_name(layer) or "").options}
    cannot = ", which cannot take statistics over all ranks"
    return [
        f"{what} synchronizes torch's batch norms only, not {_which(layers)}{instead}"
        for layers, instead in ((able, ": make them with sync=True"), (_without(alone, able), cannot))
        if layers and (asked or by_hand)
    ]


def _of_synchronization(trainer: Trainer, model: nn.Module) -> Iterator[str]:
    connector = getattr(trainer, "_accelerator_connector", None)  # no public attribute tells of sync_batchnorm
    asked = getattr(connector, "_layer_sync", None) is not None
    yield from unsynchronized(model, trainer.world_size, asked)
    plain = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and layer_name(m)}
    if asked and plain and hasattr(trainer.strategy, "_layer_sync") and trainer.strategy.root_device.type == "cpu":
        yield (
            f"sync_batchnorm=True makes {_which(plain)} torch.nn.SyncBatchNorm, which works on GPUs only: leave it "
            "out, and make them with sync=True"
        )


def _of_averages(what: str, model: nn.Module) -> Iterator[str]:
    layers = _layers(model)
    streams = {name: layer for name, layer in layers.items() if layer_name(layer) == "online"}
    for some, instead in (
        (_without(layers, streams), "call normzoo.reestimate_statistics(model, batches)"),
        (streams, "run batches through the model in training mode"),
    ):
        if some:
            yield f"{what}: for {_which(some)}, {instead} after fit"


def _of_finetuning(name: str, model: nn.Module, frozen: str) -> Iterator[str]:
    layers = {n: layer for n, layer in _layers(model).items() if n.startswith(frozen)}
    freezable = {n: layer for n, layer in layers.items() if layer_name(layer) in FROZEN_KINDS}
    for some, instead in (
        (freezable, "normzoo.freeze_norms(model) fixes them"),
        (_without(layers, freezable), "put them in evaluation mode before fit"),
    ):
        if some:
            yield (
                f"{name} freezes running statistics of torch's batch norms only, and train_bn is for no others: those "
                f"of {_which(some)} go on moving; {instead}"
            )


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The zoo's layers with statistics of the batch that are not torch's to such tools."""
    return {
        plain_name(name): module
        for name, module in model.named_modules()
        if not isinstance(module, _BatchNorm) and (norm := layer_name(module)) and norm_info(norm).batch_statistics
    }


def _without(layers: Layers, others: Layers) -> Layers:
    return {name: layer for name, layer in layers.items() if name not in others}


def _which(layers: Layers) -> str:
    classes = list(dict.fromkeys(type(layer).__name__ for layer in layers.values()))
    kinds = ", ".join([*classes[:3], *["..."] * (len(classes) > 3)])
    return f"{next(iter(layers))}{f' and {len(layers) - 1} more' * (len(layers) > 1)} ({kinds})"
