"""Mean and variance of channels over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn

from normzoo.callbacks._figures import depth_profile
from normzoo.callbacks._isolation import Snapshot, beside_the_run, check_training_step, isolated, training_step
from normzoo.callbacks._record import key
from normzoo.callbacks._recording import RecordingCallback, checked_dirpath, checked_label
from normzoo.callbacks._sampling import BatchesDue
from normzoo.callbacks._schedule import Schedule, as_schedule
from normzoo.callbacks._taps import (
    Reading,
    check_strategy,
    compiled_modules,
    find_modules,
    makes_modules_later,
    scripted_modules,
)
from normzoo.convert._sites import recognised_norms, to_try
from normzoo.functional.channel_moments import (
    channel_moments,
    dead_channels,
    merge_moments,
    moment_drift,
    moments_variance,
)
from normzoo.recognition import channel_dim

Site = tuple[str, str]  # name of the module, "input" or "output"
_WHERE = {"input": ("input",), "output": ("output",), "both": ("input", "output")}
_LOGGED = ("mean", "variance", "dead", "mean_drift")


class ChannelMoments(RecordingCallback):
    """Records mean and variance of each channel, over batch and space, at the inputs or outputs of modules.

    They are those of the whole step: micro-batches and ranks are merged by the parallel-variance formula. A row of the
    record ``channel_moments`` for each sampled step, module and side holds the profile over depth: ``mean`` (of the
    magnitudes), ``variance``, ``variance_max``, the number of ``dead`` channels, and for inputs of modules with running
    statistics how far the batch is from these as they were before the step (``mean_drift``, ``std_drift``, by
    :func:`normzoo.functional.moment_drift`; under DDP from those of rank 0). Logged under
    ``channel_input/STAT/MODULE`` and ``channel_output/STAT/MODULE``.

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

    quantity = "channel_moments"
    needs_optimizer = False

    _step: int | None  # whose moments are being taken
    _moments: dict[Site, list[Tensor]]
    _running: dict[str, Tensor]
    _seen: set[Site]  # in this micro-batch

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
        self._is_due = BatchesDue(as_schedule(every_n_steps))
        self.sites, self.where, self.channel_dim = sites, where, channel_dim
        to_try(recognise)  # which says what it may be
        self.recognise, self._dims = recognise, dict[nn.Module, int | None]()
        self.dead_below, self.dirpath, self.label = dead_below, checked_dirpath(dirpath), checked_label(label)
        self._modules: dict[str, nn.Module] = {}
        self._apart = False  # whether a module is compiled, and training_step is evaluated once more to hear it
        self._channels: dict[Site, int] | None = None
        self._pending: tuple[int, Reading, dict[str, int], Reading | None] | None = None
        self._handles: list[Any] = []
        self._reset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and open the record."""
        check_strategy(trainer, self)
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not makes_modules_later(pl_module):
            self._find(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules, which may have been made or replaced since, and continue the record."""
        super().on_train_start(trainer, pl_module)
        self._is_due.start(trainer)
        self._reset()
        self._modules, self._channels = self._find(pl_module), None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to this micro-batch, if due."""
        self._close()  # of a batch that was skipped
        if self._is_due(trainer.global_step):
            self._step = trainer.global_step
            if self._apart:
                self._evaluate_apart(trainer, pl_module, batch, batch_idx)
            else:
                self._listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop listening; if the step has been made, send its moments on their way without waiting for them."""
        self._close()
        self._seen = set()
        self.flush(trainer)
        if self._step is not None and trainer.global_step != self._step:
            self._send(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what a skipped batch has left."""
        self._close()
        for site in self._seen:
            self._moments[site].pop()
        self._seen = set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._close()

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
        }

    def flush(self, trainer: Trainer) -> None:
        """Write the last sample, if it has not been."""
        if self._pending is None:
            return
        (step, moments, with_running, running), self._pending = self._pending, None
        gathered = moments.read()
        if not self._record.writes or self._channels is None:
            return
        sites = list(self._channels)
        parts = gathered.split([3 * c for c in self._channels.values()], dim=1)
        values = running.read().split([2 * c for c in with_running.values()]) if running is not None else ()
        before = {name: v.view(2, -1) for name, v in zip(with_running, values, strict=True)}
        depth = {name: i for i, name in enumerate(self._modules)}
        rows = []
        for (name, where), part in zip(sites, parts, strict=True):
            packed = merge_moments(part.reshape(len(part), 3, -1))
            if packed[0].any():
                profile = self.profile(packed, before.get(name) if where == "input" else None)
                rows.append({"step": step, "layer": name, "where": where, "depth": depth[name], **profile})
        self._record.append(*rows)
        scalars = {key(f"channel_{r['where']}", s, r["layer"]): r[s] for r in rows for s in _LOGGED}
        self._record.log({k: v for k, v in scalars.items() if v is not None}, step)
        if rows:
            self._record.log_figure(key("channel", "profile"), partial(depth_profile, rows), step)

    def _find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        self._dims = recognised_norms(pl_module, self.recognise)
        found = find_modules(pl_module, self.sites, self._dims)
        if not found:
            what = "is a normalization layer" if self.sites == "norms" else f"matches {self.sites!r}"
            names = ", ".join(name for name, _ in pl_module.named_modules() if name)
            raise ValueError(f"no module {what}; there are {names}")
        scripted, compiled = scripted_modules(pl_module), compiled_modules(pl_module)
        hidden = [name for name, module in found.items() if module in scripted]
        if hidden:
            raise ValueError(
                f"ChannelMoments cannot listen to {hidden[0]}: torch.jit has made it, and runs no hooks; choose sites "
                "outside of it, or train what it was made from"
            )
        self._apart = any(module in compiled for module in found.values())
        if self._apart:
            instead = "train without torch.compile, or choose sites outside of what it compiles"
            check_training_step(pl_module, "ChannelMoments, for modules that are compiled,", instead)
        return found

    def _evaluate_apart(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to a pass of this micro-batch of our own, which nothing that is compiled takes part in."""
        network: Any = pl_module if isinstance(pl_module, nn.Module) else pl_module.model  # in a plain loop
        with isolated(Snapshot(network, batch), trainer), torch.compiler.set_stance("force_eager"):
            self._listen()
            try:
                training_step(trainer, pl_module, batch, batch_idx)
            finally:
                self._close()

    def _listen(self) -> None:
        self._seen = set()
        for name, module in self._modules.items():
            if "input" in _WHERE[self.where]:
                hook = partial(self._before, name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if "output" in _WHERE[self.where]:
                self._handles.append(module.register_forward_hook(partial(self._after, name)))

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if self._take((name, "input"), module, x) and name not in self._running:
            mean, var = (getattr(module, n, None) for n in ("running_mean", "running_var"))
            channels = self._moments[name, "input"][0].shape[-1]
            # As they were before the step: the forward pass is about to move them
            if isinstance(mean, Tensor) and isinstance(var, Tensor) and mean.numel() == var.numel() == channels:
                self._running[name] = torch.stack([mean.detach().flatten(), var.detach().flatten()])

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._take((name, "output"), module, output)

    def _take(self, site: Site, module: nn.Module, x: Any) -> bool:
        """Take in the first call of a micro-batch; whether it was."""
        if site in self._seen or beside_the_run() is not self._apart:  # another callback evaluates something
            return False
        self._seen.add(site)
        dim = self._dims.get(module) or channel_dim(module, self.channel_dim)
        if not isinstance(x, Tensor) or not x.is_floating_point() or not -x.ndim <= dim < x.ndim:
            found = f"a {x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(
                f"ChannelMoments needs floating-point channels along dimension {dim}; the {site[1]} of {site[0]} is "
                f"{found}; choose other sites"
            )
        with torch.no_grad():
            packed = channel_moments(x, dim)
        channels = (self._channels or {}).get(site) or (self._moments.get(site) or [packed])[0].shape[-1]
        if packed.shape[-1] != channels:
            raise ValueError(
                f"the {site[1]} of {site[0]} had {channels} channels along dimension {dim}, and now "
                f"{packed.shape[-1]}; if they are along another, pass channel_dim, or choose other sites"
            )
        self._moments.setdefault(site, []).append(packed)
        return True

    def _send(self, pl_module: LightningModule) -> None:
        step, moments, running = self._step, self._moments, self._running
        self._reset()
        if self._channels is None:
            self._channels = self._agree(moments, pl_module.device)
        if not self._channels or step is None:
            return
        flat = [
            merge_moments(torch.stack(moments[site])).flatten()
            if moments.get(site)
            else torch.zeros(3 * channels, dtype=torch.float64, device=pl_module.device)
            for site, channels in self._channels.items()
        ]
        before = Reading(torch.cat([v.flatten().double() for v in running.values()])) if running else None
        sizes = {name: v.shape[-1] for name, v in running.items()}
        self._pending = (step, Reading(torch.cat(flat), gather=True), sizes, before)

    def _agree(self, moments: Mapping[Site, Sequence[Tensor]], device: torch.device) -> dict[Site, int]:
        """The number of channels of each site that any rank called: what is gathered has the same layout on all."""
        sites = [(name, where) for name in self._modules for where in _WHERE[self.where]]
        channels = [moments[site][0].shape[-1] if moments.get(site) else 0 for site in sites]
        if dist.is_available() and dist.is_initialized():
            channels = Reading(torch.tensor(channels, device=device), dist.ReduceOp.MAX).read().tolist()
        silent = [f"the {where} of {name}" for (name, where), c in zip(sites, channels, strict=True) if not c]
        if silent:
            rank_zero_warn(
                f"ChannelMoments does not follow {', '.join(silent)}: no call of it in the first sampled step"
            )
        return {site: c for site, c in zip(sites, channels, strict=True) if c}

    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _reset(self) -> None:
        self._close()
        self._step, self._moments, self._running, self._seen = None, {}, {}, set()
