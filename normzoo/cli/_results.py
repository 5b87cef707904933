"""What a module has logged and accumulated since an epoch began, which Lightning's checkpoints leave out."""

from __future__ import annotations

import builtins
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torchmetrics import Metric

_OF_METADATA = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
_OF_RESULT = ("value", "cumulated_batch_size", "_forward_cache", "_computed", "_update_count", "has_reset")


def metrics_state(module: LightningModule) -> dict[str, dict[str, Any]]:
    """The states of the torchmetrics objects of a module, by name."""
    return {
        name: {"state": metric.metric_state, "updates": metric._update_count}
        for name, metric in module.named_modules()
        if isinstance(metric, Metric)
    }


def set_metrics_state(module: LightningModule, states: dict[str, dict[str, Any]]) -> None:
    """Go on from what :func:`metrics_state` returned."""
    for name, metric in module.named_modules():
        if isinstance(metric, Metric) and name in states:
            for key, value in states[name]["state"].items():
                setattr(metric, key, move_data_to_device(value, module.device))
            metric._update_count, metric._computed = states[name]["updates"], None


def results_state(trainer: Trainer) -> list[dict[str, Any]]:
    """What ``self.log`` of the training epoch has accumulated, as plain data."""
    return [
        {
            "key": key,
            "of": {name: getattr(result.meta, name) for name in _OF_METADATA},
            "reduce": result.meta.reduce_fx.__name__,
            "builtin": result.meta.reduce_fx in (min, max, sum),
            "dataloader_idx": result.meta.dataloader_idx,
            "metric": result.meta.metric_attribute,
            "sync_dist": result.meta.sync.should,
            "rank_zero_only": result.meta.sync.rank_zero_only,
            "state": {
                name: value
                for name in _OF_RESULT
                if not isinstance(value := getattr(result, name, None), Metric) and value is not None
            },
        }
        for key, result in trainer.fit_loop.epoch_loop._results.items()
        if result.meta.sync.group is None and (result.is_tensor or result.meta.metric_attribute)
    ]


def set_results_state(trainer: Trainer, module: LightningModule, states: list[dict[str, Any]]) -> None:
    """Go on from what :func:`results_state` returned."""
    for entry in states:
        meta = _Metadata(
            **entry["of"],
            reduce_fx=getattr(builtins if entry["builtin"] else torch, entry["reduce"]),
            dataloader_idx=entry["dataloader_idx"],
            metric_attribute=entry["metric"],
        )
        meta.sync = _Sync(
            fn=trainer.strategy.reduce, _should=entry["sync_dist"], rank_zero_only=entry["rank_zero_only"]
        )
        result = _ResultMetric(meta, is_tensor=entry["metric"] is None)
        for name, value in entry["state"].items():
            setattr(result, name, move_data_to_device(value, module.device))
        if entry["metric"] is not None:
            result.value = module.get_submodule(entry["metric"])
        trainer.fit_loop.epoch_loop._results[entry["key"]] = result
