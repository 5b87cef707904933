"""Mean and variance of channels over depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn

from normzoo.callbacks._run.modules import Site, find_modules, none_found
from normzoo.callbacks._run.ranks import NamedReading, Reading
from normzoo.callbacks.measurement import Column, Figure, Measurement, Run, Sample, Step
from normzoo.callbacks.schedule import Schedule
from normzoo.convert._sites import recognised_norms, to_try
from normzoo.functional.channel_moments import (
    channel_moments,
    dead_channels,
    merge_moments,
    moment_drift,
    moments_variance,
)
from normzoo.recognition import channel_dim

_WHERE = {"input": ("input",), "output": ("output",), "both": ("input", "output")}


class ChannelMoments(Measurement):
    """Records mean and variance of each channel, over batch and space, at the inputs or outputs of modules.

    They are those of the whole step: micro-batches and ranks are merged by the parallel-variance formula. A row of the
    record ``channel_moments`` for each sampled step, module and side holds the profile over depth: ``mean`` (of the
    magnitudes), ``deviation``, ``variance``, ``variance_max``, the number of ``dead`` channels, and for inputs of
    modules with running statistics how far the batch is from these as they were before the step (``mean_drift``,
    ``std_drift``, by :func:`normzoo.functional.moment_drift`; under DDP from those of rank 0). Logged under
    ``channel_moments/input/STAT/MODULE`` and ``channel_moments/output/STAT/MODULE``.

    A module's first call for each micro-batch is counted, and no later one: what activation checkpointing computes
    again in the backward pass, and further uses of a shared module, are left out. A module that no rank calls in the
    first sampled step is not followed. Under DDP a sampled step gathers the moments once; the first of a run also
    agrees on the numbers of channels, and waits for that.

    If ``torch.compile`` has made the code that calls one of the modules, which knows no hooks for single steps, each
    micro-batch of a sampled step goes through ``training_step`` once more, uncompiled, before it is trained on (and
    before the module's own ``on_train_batch_start``): with the random draws that come next, in isolation as that of
    :class:`RelativeLoss`, and with the same moments up to rounding. That costs a forward pass and holds another copy
    of the parameters meanwhile.

    Args:
        every_n_steps: sample when the number of optimizer steps made is a multiple of this; or a schedule. Of a
            batch that brings several steps, as with several optimizers, the next one is sampled if one of them was due.
        sites: ``"norms"``, all normalization layers; or names of modules, with ``*`` as in a shell; or a list of these.
        where: ``"input"`` (the first argument that is a tensor), ``"output"`` or ``"both"``.
        channel_dim: of modules that do not tell theirs; layers of the zoo, LayerNorm, RMSNorm and Linear do.
        dead_below: a channel is dead if its variance is at most this multiple of the site's median.
        recognise: whether modules of unknown classes that compute a norm are normalization layers too: True to try each
            at setup (see :func:`normzoo.convert_norms`), or the report of a conversion that recognised them.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: for arguments out of range; at setup for unsupported strategies, if no module matches, if one that
            does is scripted, or if one is compiled and ``training_step`` cannot be evaluated once more (manual
            optimization, ``dataloader_iter``); at a sampled step if what a module is given or returns has no channels.

    Source: profiles over depth as in Bjorck et al. 2018, arXiv 1806.02375; merging by Chan, Golub & LeVeque 1983.
    """

    name = "channel_moments"
    row = "one sampled step, module, and `input` or `output`"
    columns = (
        Column("layer", "text", "name of the module"),
        Column("where", "text", "`input` or `output` of the module"),
        Column("depth", "int", "place among the modules followed, in the order of their definition, from 0"),
        Column("channels", "int", "number of channels"),
        Column("count", "int", "values of each channel: batch times space, of all micro-batches and ranks"),
        Column("mean", "float", "mean over the channels of the magnitude of their means", logged=True),
        Column("variance", "float", "mean over the channels of their (biased) variances", logged=True),
        Column("variance_max", "float", "largest variance of a channel"),
        Column(
            "dead", "int", "channels whose variance is at most `dead_below` times the median channel's", logged=True
        ),
        Column(
            "mean_drift",
            "float",
            "mean over the channels of the distance from `running_mean`, as it was before the step, in running "
            "standard deviations; null without running statistics and for outputs",
            logged=True,
        ),
        Column(
            "std_drift",
            "float",
            "mean over the channels of the distance of the standard deviation from the running one, as it was before "
            "the step; null without running statistics and for outputs",
        ),
        Column("deviation", "float", "mean over the channels of their standard deviations"),
    )
    figures = tuple(
        Figure(
            title,
            "profile",
            x="depth",
            y=column,
            lines=("where",),
            y_scale="log",
            x_label="depth (modules followed)",
            y_label=label,
            samples=True,
        )
        for title, column, label in (
            ("Channels over depth", "variance", "variance of channels, mean"),
            ("Channel means over depth", "mean", "|mean| of channels, mean"),
            ("Channel deviations over depth", "deviation", "standard deviation of channels, mean"),
        )
    )
    key = "{where}/{stat}/{layer}"
    earlier_key = "channel_{where}/{stat}/{layer}"
    needs = frozenset({"activations"})
    unit = "batch"
    reduce = "gather"
    by_default = True

    def __init__(
        self,
        every_n_steps: int | Schedule = 50,
        *,
        sites: str | list[str] | tuple[str, ...] = "norms",
        where: str = "input",
        channel_dim: int = 1,
        dead_below: float = 1e-6,
        recognise: bool | Any = False,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        if where not in _WHERE:
            raise ValueError(f"where must be one of {', '.join(map(repr, _WHERE))}, not {where!r}")
        names = [sites] if isinstance(sites, str) else sites
        if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            raise TypeError(f"sites must be 'norms', or names or patterns of modules, not {sites!r}")
        if not sites:
            raise ValueError("sites must be 'norms' or at least one name or pattern of modules; it is empty")
        if not 0 <= dead_below < 1:
            raise ValueError(f"dead_below must be from 0 to below 1, not {dead_below}")
        self.patterns, self.where, self.channel_dim = sites, where, channel_dim
        to_try(recognise)  # which says what it may be
        self.recognise, self.dead_below = recognise, dead_below
        self._dims: dict[nn.Module, int | None] = {}
        self._depth: dict[str, int] = {}
        self._channels: dict[Site, int] | None = None
        super().__init__(every_n_steps, dirpath=dirpath, label=label)

    def sites(self, run: Run) -> dict[Site, nn.Module]:
        """The modules that are norms, or whose names match, at their inputs, outputs or both."""
        self._dims = recognised_norms(run.module, self.recognise)
        found = find_modules(run.module, self.patterns, self._dims)
        if not found:
            raise ValueError(none_found(run.module, self.patterns))
        self._depth = {name: i for i, name in enumerate(found)}
        return {(name, where): module for name, module in found.items() for where in _WHERE[self.where]}

    def start(self, run: Run) -> None:
        """The first sampled step tells which sites are called, and how many channels they have."""
        self._channels = None

    def activation(self, step: Step, site: Site, module: nn.Module, x: Any) -> Tensor:
        """The moments of the channels; at the first call the running statistics, which it is about to move."""
        dim = self._dims.get(module) or channel_dim(module, self.channel_dim)
        if not isinstance(x, Tensor) or not x.is_floating_point() or not -x.ndim <= dim < x.ndim:
            found = f"a {x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(
                f"ChannelMoments needs floating-point channels along dimension {dim}; the {site[1]} of {site[0]} is "
                f"{found}; choose other sites"
            )
        packed = channel_moments(x, dim)
        channels = (self._channels or {}).get(site) or (step.seen[site] or [packed])[0].shape[-1]
        if packed.shape[-1] != channels:
            raise ValueError(
                f"the {site[1]} of {site[0]} had {channels} channels along dimension {dim}, and now "
                f"{packed.shape[-1]}; if they are along another, pass channel_dim, or choose other sites"
            )
        running = step.memory.setdefault("running", {})
        if site[1] == "input" and site[0] not in running:
            mean, var = (getattr(module, n, None) for n in ("running_mean", "running_var"))
            if isinstance(mean, Tensor) and isinstance(var, Tensor) and mean.numel() == var.numel() == channels:
                running[site[0]] = torch.stack([mean.detach().flatten(), var.detach().flatten()])
        return packed

    def measure(self, step: Step) -> None:
        """Send the moments of all micro-batches, merged."""
        if self._channels is None:
            self._channels = self._agree(step)
        if not self._channels:
            return
        moments = {
            f"{name}/{where}": merge_moments(torch.stack(step.seen[name, where]))
            if step.seen[name, where]
            else torch.zeros(3, channels, dtype=torch.float64, device=step.run.device)
            for (name, where), channels in self._channels.items()
        }
        running = step.memory.get("running", {})
        before = NamedReading({name: v.double() for name, v in running.items()}, None) if running else None
        self.send(step, moments, running=before)

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """A row for each site that was called, from its moments, (ranks, 3, C)."""
        if not self.writes or self._channels is None:
            return []
        before = sample.about["running"].read() if sample.about["running"] is not None else {}
        rows = []
        for (name, where), gathered in zip(self._channels, values.values(), strict=True):
            packed = merge_moments(gathered)
            if packed[0].any():
                profile = self.profile(packed, before.get(name) if where == "input" else None)
                rows.append({"layer": name, "where": where, "depth": self._depth[name], **profile})
        return rows

    def profile(self, packed: Tensor, running: Tensor | None) -> dict[str, Any]:
        """The columns that say something of a site, from its packed moments and (2, C) running mean and variance."""
        count, mean, _ = packed
        variance = moments_variance(packed)
        threshold = self.dead_below * variance.nanmedian().nan_to_num(0.0).item()
        drifts: list[float | None] = [None, None]
        if running is not None:
            drifts = [d.abs().mean().item() for d in moment_drift(mean, variance, *running.to(mean))]
        return {
            "channels": len(mean),
            "count": int(count.max()),
            "mean": mean.abs().mean().item(),
            "variance": variance.mean().item(),
            "variance_max": variance.max().item(),
            "dead": int(dead_channels(variance, threshold).sum()),
            "mean_drift": drifts[0],
            "std_drift": drifts[1],
            "deviation": variance.sqrt().mean().item(),
        }

    def _agree(self, step: Step) -> dict[Site, int]:
        """The number of channels of each site that any rank called: what is gathered has the same layout on all."""
        sites = [(name, where) for name in self._depth for where in _WHERE[self.where]]
        own = [step.seen[site][0].shape[-1] if step.seen[site] else 0 for site in sites]
        channels = Reading(torch.tensor(own, device=step.run.device), "max").read().tolist()
        silent = [f"the {where} of {name}" for (name, where), c in zip(sites, channels, strict=True) if not c]
        if silent:
            rank_zero_warn(
                f"ChannelMoments does not follow {', '.join(silent)}: no call of it in the first sampled step"
            )
        return {site: c for site, c in zip(sites, channels, strict=True) if c}
