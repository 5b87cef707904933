"""Precise batch norm: running statistics of all the batches of a loader (Wu & Johnson 2021, arXiv 2105.07576)."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from normzoo.changes import CountReport, LeftSite
from normzoo.convert._running import Forward, batches_of, evaluating, run_batch
from normzoo.convert._tally import Tally, by_batch, is_stream, running_buffers
from normzoo.recognition import describe, is_frozen, known_class

_OF_STREAM = "its statistics are of a stream of samples, not of batches"


@dataclass
class ReestimatedSite:
    """One layer whose running statistics were replaced.

    Attributes:
        name: its dotted name.
        layer: its class and kind.
        statistics: the names of the buffers that were replaced.
    """

    name: str
    layer: str
    statistics: list[str]


@dataclass(eq=False, repr=False)
class ReestimationReport(CountReport):
    """What :func:`normzoo.reestimate_statistics` did; see :class:`normzoo.changes.ChangeReport`.

    Attributes:
        changed: one :class:`ReestimatedSite` for each layer whose statistics were replaced.
        left: one :class:`~normzoo.changes.LeftSite` for each other layer that holds running statistics.
        batches: how many batches were seen, by all ranks together.
    """

    changed: list[ReestimatedSite] = field(default_factory=list)
    batches: int = 0

    _function: ClassVar[str] = "reestimate_statistics"

    def _title(self) -> str:
        return f"statistics of {len(self)} layers taken from {self.batches} batches"

    def _headings(self) -> tuple[str, ...]:
        return ("site", "layer", "statistics")

    def _row(self, site: ReestimatedSite) -> tuple[str, ...]:
        return (site.name, site.layer, ", ".join(site.statistics))


def reestimate_statistics(
    model: nn.Module, loader: Iterable[Any], *, num_batches: int | None = None, forward: Forward | None = None
) -> ReestimationReport:
    """Replace running statistics by those of all the batches of a loader: precise batch norm.

    Moving averages lag behind the weights, and weigh the last few batches alone. With n_b the number of values per
    channel in batch b, and mean_b and var_b what the layer takes from it (var_b biased or not as it writes it)::

        running_mean = sum_b n_b mean_b / sum_b n_b
        running_var  = sum_b n_b (var_b + (mean_b - running_mean)^2) / sum_b n_b

    the variance of the union, by the law of total variance. Other buffers ``running_*``, and ``running_var`` where
    there is no mean, become the weighted averages of the batches' values: ``running_whitening`` of ``iter_norm``,
    ``running_phi`` of ``power``, ``running_var`` of ``evonorm_b0``. That of ``l1_batch`` is a squared deviation and
    merged as a variance. A layer that is called several times in one pass takes each call for a batch; one that is
    never called keeps what it has.

    During the pass the layers normalize by the batch alone (``batch_renorm`` without its corrections, ``power`` by
    the batch's quadratic mean), whatever mode they are in; all else is as in evaluation. There are no gradients.
    Afterwards modes, momentum, ``num_batches_tracked``, parameters and random streams are as they were.

    Left alone are frozen layers, those with ``track_running_stats = False``, and ``online``, whose statistics are of a
    stream, not of batches; in the pass they normalize as in evaluation.

    With several ranks, what they hold is merged in one collective at the end, which all must enter: R ranks with
    shards equal one rank with all batches, also if they hold different numbers of batches, or none. For this,
    ``sync=True`` and ``SyncBatchNorm`` are off during the pass, since ranks out of batches would let the others
    wait: each batch is normalized by its own rank's values. If one rank fails, all raise and none is changed.

    Args:
        model: any module; DistributedDataParallel, DataParallel and torch.compile are looked through.
        loader: gives batches, each a tensor, a dict of keyword arguments, or a sequence that begins with as many inputs
            as the model's forward requires; put on the model's device. A list of tensors is one input if forward's
            first argument is annotated as a list, as of torchvision's detectors.
        num_batches: how many to take, of each rank; None for all. Some thousand samples are plenty.
        forward: called as ``forward(model, batch)``, with the model without its wrappers, for batches of other kinds.

    Returns:
        a :class:`ReestimationReport`: the layers whose statistics were replaced, and why those of others were not.

    Raises:
        ValueError: if there is no layer with running statistics, or none is reached; if there are no batches, or one
            cannot be run; for a layer whose statistics of single batches cannot be had, or are not finite; for a
            model sharded by FSDP. The model is then as it was, as after any other error.

    Source: Wu & Johnson 2021, arXiv 2105.07576, section 3.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout())
        >>> len(reestimate_statistics(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])]))
        1
        >>> model[0].running_mean.item(), model[0].running_var.item()  # of 0, 2 and 4, 6: 2 within, 4 between
        (3.0, 6.0)
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, or None for all, not {num_batches}")
    model = _unwrapped(model)
    layers, left = _layers(model)
    tallies = [Tally.of(name, layer) for name, layer in layers.items()]
    failure: Exception | None = None
    seen = 0
    with _set_for_the_pass(model, tallies):
        try:
            for i, batch in enumerate(itertools.islice(batches_of(loader), num_batches)):
                run_batch(model, batch, i, forward)
                seen += 1
        except Exception as error:  # told to the other ranks first
            failure = error
    seen = _merge_ranks(tallies, seen, failure)
    if not seen:
        raise ValueError("there are no batches to take statistics from")
    reached = [tally for tally in tallies if tally.weight]
    if not reached:
        raise ValueError(f"none of the {len(tallies)} layers with running statistics was called in the forward pass")
    for tally in reached:
        tally.check()
    for tally in reached:
        tally.write()
    left += [_left(t.name, t.layer, "it was not called in the forward pass") for t in tallies if not t.weight]
    changed = [ReestimatedSite(t.name, describe(t.layer), list(t.averages)) for t in reached]
    return ReestimationReport(changed, left, seen)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers whose forward would wait for other ranks or make copies.

    Raises:
        ValueError: for a model that cannot be run without them.
    """
    while (wrapper := _wrapper(model)) in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
        model = model._orig_mod if wrapper == "OptimizedModule" else model.module  # type: ignore[assignment]
    for name, module in model.named_modules():
        if (wrapper := _wrapper(module)) not in (None, "OptimizedModule"):
            where = f" at {name!r}" if name else ""
            raise ValueError(
                f"the model is wrapped in {wrapper}{where}: take statistics on a whole model, where no layer waits for "
                "other ranks"
            )
    return model


def _wrapper(module: nn.Module) -> str | None:
    names = (
        "DistributedDataParallel",
        "DataParallel",
        "OptimizedModule",
        "FullyShardedDataParallel",
        "FSDPModule",
        "ScriptModule",
    )
    found = [c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.") and c.__name__ in names]
    return found[0] if found else None


def _layers(model: nn.Module) -> tuple[dict[str, nn.Module], list[LeftSite]]:
    """The layers that keep statistics of batches, each once, and those whose statistics are not of batches.

    Raises:
        ValueError: if there are none of the former.
    """
    found: dict[str, nn.Module] = {}
    left: list[LeftSite] = []
    for name, module in model.named_modules():
        if not running_buffers(module):
            continue
        named = name or type(module).__name__
        if why := _not_of_batches(module):
            left.append(_left(named, module, why))
        else:
            found[named] = module
    if not found:
        streams = sum(site.why == _OF_STREAM for site in left)
        why = f"; the statistics of its {streams} online layers are of a stream, not of batches" if streams else ""
        raise ValueError(f"{type(model).__name__} has no layer with running statistics of batches{why}")
    return found, left


def _not_of_batches(module: nn.Module) -> str:
    """Why a layer's running statistics are not those of batches; empty if they are."""
    if is_frozen(module):
        return "it is frozen"
    if not getattr(module, "track_running_stats", True):
        return "it does not track its statistics"
    if is_stream(module):
        return _OF_STREAM
    known = known_class(module)
    if known is not None and not known.overridden and known.kind.name == "evonorm_b0":
        return "" if getattr(module, "apply_act", True) else "without its activation it is a scale and shift"
    return ""


def _left(name: str, module: nn.Module, why: str) -> LeftSite:
    return LeftSite(name, describe(module), None, why)


@contextlib.contextmanager
def _set_for_the_pass(model: nn.Module, tallies: list[Tally]) -> Iterator[None]:
    """Inside, the layers normalize by batches and are counted; then everything is as it was."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(_same_random_streams(model))
        if "torch._dynamo" in sys.modules:  # or it would compile anew for the hooks and modes of the pass
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(evaluating(model))
        for tally in tallies:
            undo.enter_context(by_batch(tally.layer))
            undo.callback(tally.layer.register_forward_pre_hook(tally.before, with_kwargs=True).remove)
            undo.callback(tally.layer.register_forward_hook(tally.after, with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def _same_random_streams(model: nn.Module) -> Iterator[None]:
    """A loader draws from them, if only to seed its workers."""
    devices = {t.device.index for t in itertools.chain(model.parameters(), model.buffers()) if t.device.type == "cuda"}
    of_python, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(of_python)
        if numpy:
            numpy.random.set_state(of_numpy)


def _merge_ranks(tallies: list[Tally], seen: int, failure: Exception | None) -> int:
    """Merge the tallies over ranks, in one collective that also tells who failed; the number of all batches.

    Raises:
        Exception: this rank's, or a ValueError if another one failed.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        if failure is not None:
            raise failure
        return seen
    parts = [part for tally in tallies for part in tally.packed()]
    device = parts[0].device
    own = torch.cat([parts[0].new_tensor([seen, failure is not None]), *(part.to(device) for part in parts)])
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    if failure is not None:
        raise failure
    heads = [row[:2].tolist() for row in rows]
    failed = [str(rank) for rank, (_, failed) in enumerate(heads) if failed]
    if failed:
        raise ValueError(f"rank {', '.join(failed)} failed, so that the statistics of none were replaced")
    sizes = [part.numel() for part in parts]
    for tally in tallies:
        tally.clear()
    for row in rows:
        remaining = iter(row[2:].split(sizes))
        for tally in tallies:
            weight, *of_rank = itertools.islice(remaining, len(tally.packed()))
            tally.merge_packed(weight.item(), [part.to(tally.device) for part in of_rank])
    return int(sum(count for count, _ in heads))
