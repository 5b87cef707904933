"""Whether the terms that a convolution's gradient is summed of have the same sign."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from normzoo.callbacks._run.gradients import check_differentiable
from normzoo.callbacks._run.modules import scripted_modules
from normzoo.callbacks.measurement import Column, Figure, Measurement, Run, Sample, Step
from normzoo.callbacks.relative_loss import LossFunction
from normzoo.callbacks.schedule import Schedule
from normzoo.functional.gradient_sums import channel_means, convolution_gradient_sums

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KERNEL, _OUTPUT, _INPUT = "kernel", "output", "input"


class GradientSums(Measurement):
    """Records, for each convolution, the sum of its gradient's terms against the sum of their magnitudes.

    An entry of a kernel's gradient is a sum over the images of the mini-batch and the positions in space, of an input
    times an output gradient. ``sum`` is the mean over the kernel's entries of the magnitude of that sum,
    ``magnitudes`` the mean of the sum of magnitudes, and ``ratio`` the first over the second: 1 if in each entry all
    terms have the same sign, so that the gradient hardly depends on image and position, and near 0 if they cancel.

    The record ``gradient_sums`` has a row for each sampled step and convolution, and for those that ``channels`` names
    one for each of their output and input channels, of the means over the kernel's entries of this channel
    (``channel_ratio``). ``ratio`` is logged as ``gradient_sums/ratio/LAYER``.

    The mini-batch is the one being trained on (the last micro-batch, when accumulating); its loss is neither clipped
    nor scaled. The terms come from a forward and a backward pass beside the run, in training mode, with the parameters
    before the step, which leave no trace in it (as those of :class:`GradientPredictiveness`). A convolution that is
    called several times has the terms of all calls. What pads with other values than zeros has these among its inputs.
    A sampled step costs these passes and twice the gradient of the convolutions' kernels; meanwhile it holds what a
    training pass holds, three more gradients of the convolutions, and magnitudes of input and output of one
    convolution at a time.

    Under DDP the sums run over the images of all ranks, for which they sum two numbers for each value of the kernels,
    in one all-reduce: the measurement is exempt from the rule that one small collective serves a sampled step. Of
    several optimizers the steps of the first are sampled.

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        sites: names of convolutions, with ``*`` as in a shell, or a list of these; by default all that have trainable
            parameters.
        channels: names or patterns of those of them whose channels have rows of their own, of which the second figure
            is drawn; by default of none.
        loss: ``loss(module, batch)``, a tensor of one value that can be differentiated, without gradient scaling; by
            default the module's own ``training_step``.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: at setup for strategies other than one device and DDP, for local SGD, for manual optimization
            without ``loss``, for a ``training_step`` that takes ``dataloader_iter``, and if no convolution matches, or
            one that does is scripted; at a sampled step for a convolution whose output has another size than its
            attributes say, for checkpoints with ``use_reentrant=True``, and for a loss that requires no gradient.
        TypeError: for names that are no strings, and for a loss that is no function, or that returns anything else than
            a tensor of one value.

    Source: Bjorck et al. 2018, arXiv 1806.02375, equation 4 and table 1.
    """

    name = "gradient_sums"
    row = "one sampled step and convolution, or one of its channels"
    columns = (
        Column("layer", "text", "name of the convolution"),
        Column("depth", "int32", "place among the convolutions followed, in the order of their definition, from 1"),
        Column("of", "text", "what the means are over: all of the `kernel`, or one `output` or `input` channel of it"),
        Column("channel", "int32", "index of the channel; null for the `kernel`"),
        Column("sum", "float", "mean over entries of the magnitude of the sum over batch and space"),
        Column("magnitudes", "float", "mean over the same entries of the sum of magnitudes over batch and space"),
        Column(
            "ratio",
            "float",
            "`sum` over `magnitudes` of the kernel, from 0, terms that cancel, to 1, terms of one sign; null if both "
            "are 0, and in rows of channels",
            logged=True,
        ),
        Column("channel_ratio", "float", "the same of a channel; null in rows of the kernel"),
    )
    figures = (
        Figure(
            "Gradient sums over depth",
            "profile",
            x="depth",
            y="ratio",
            y_scale="log",
            x_label="depth (convolutions followed)",
            y_label="|sum| / sum of |·|, over batch and space",
        ),
        Figure(
            "Gradient sums of channels",
            "heat map",
            x="channel",
            y="layer",
            z="channel_ratio",
            facet="of",
            z_scale="log",
            z_label="|sum| / sum of |·|",
        ),
    )
    needs = frozenset({"batch", "extra_pass"})
    reduce = None  # the sums have been put together before the magnitude is taken

    def __init__(
        self,
        every_n_steps: int | Schedule = 500,
        *,
        sites: str | Sequence[str] = "*",
        channels: str | Sequence[str] = (),
        loss: LossFunction | None = None,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        self.sites_followed, self.channels = _patterns("sites", sites), _patterns("channels", channels)
        if not self.sites_followed:
            raise ValueError("sites must be at least one name or pattern of convolutions; it is empty")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be a function of (module, batch), or None, not {loss!r}")
        self.loss = loss
        self._convolutions: dict[str, Any] = {}
        super().__init__(every_n_steps, dirpath=dirpath, label=label)

    def check(self, run: Run) -> None:
        """Refuse ranks of different parameters, a ``training_step`` that cannot be repeated, and no convolutions."""
        if run.averages_locally:
            raise ValueError(
                "GradientSums needs ranks with the same parameters, and local SGD lets them differ; use DDP without "
                "it, or leave GradientSums out"
            )
        if self.loss is None:
            run.check_training_step("GradientSums", "pass loss=, a function of (module, batch)")
        if run.complete:
            self._find(run)

    def start(self, run: Run) -> None:
        """Find the convolutions."""
        self._convolutions = self._find(run)

    def samples(self, run: Run, index: int, made: int) -> bool:
        """The steps of the first optimizer."""
        return index == 0 and self.schedule(made)

    def measure(self, step: Step) -> dict[str, Tensor]:
        """Means of |sum| and of the sum of magnitudes: of each convolution, and of the channels of some."""
        values: dict[str, Tensor] = {}
        kernels = []
        for (name, m), (sums, magnitudes) in zip(self._convolutions.items(), self._sums(step), strict=True):
            kernels.append(torch.stack([sums.abs().double().mean(), magnitudes.double().mean()]))
            if _matches(name, self.channels):
                output, of_input = zip(*(channel_means(v, m.groups) for v in (sums.abs(), magnitudes)), strict=True)
                values |= {f"{_OUTPUT}/{name}": torch.stack(output), f"{_INPUT}/{name}": torch.stack(of_input)}
        return {_KERNEL: torch.stack(kernels), **values}

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """A row for each convolution, and for each channel of some."""
        rows = []
        for depth, (name, own) in enumerate(zip(self._convolutions, values[_KERNEL].tolist(), strict=True), start=1):
            rows.append(_row(name, depth, _KERNEL, None, *own))
            for of in (_OUTPUT, _INPUT):
                if (channels := values.get(f"{of}/{name}")) is not None:
                    rows += [_row(name, depth, of, i, *pair) for i, pair in enumerate(channels.T.tolist())]
        return rows

    def _find(self, run: Run) -> dict[str, Any]:
        """The convolutions that are followed, by name."""
        modules = run.named_modules()
        trained = {
            name: m
            for name, m in modules.items()
            if isinstance(m, _CONVOLUTIONS) and any(p.requires_grad for p in m.parameters())
        }
        found = {name: m for name, m in trained.items() if _matches(name, self.sites_followed)}
        for what, patterns in (("sites", self.sites_followed), ("channels", self.channels)):
            if patterns and not any(_matches(name, patterns) for name in found):
                raise ValueError(
                    f"no trained convolution matches {what}={list(patterns)!r}; there are "
                    f"{', '.join(trained) or 'none: leave GradientSums out'}"
                )
        scripted = scripted_modules(run.module)
        hidden = [name for name, m in found.items() if m in scripted]
        if hidden:
            raise ValueError(
                f"GradientSums cannot listen to {hidden[0]}: torch.jit has made it, and runs no hooks; choose sites "
                "outside of it, or train what it was made from"
            )
        return found

    def _sums(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        """For each convolution its gradient and the sum of magnitudes, over the images of all ranks."""
        totals = _Totals(self._convolutions)
        with (
            step.extra_passes() as one_pass,
            one_pass(),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),  # what the compiler has made runs no hooks set later
            totals.listening(),
        ):
            loss = step.training_loss() if self.loss is None else self._own_loss(step)
            scale = None
            if loss is not None:  # of training_step, which has one for this batch
                check_differentiable(loss, "GradientSums")
                scale = torch.ones_like(loss.detach())
                # Half precision takes gradients of a scaled loss, as the run does
                scale = scale if step.run.scaler is None else step.run.scaler.scale(scale)
                params = [p for m in self._convolutions.values() for p in m.parameters() if p.requires_grad]
                torch.autograd.grad(loss, params, grad_outputs=scale, allow_unused=True)
        if scale is None:
            scale = torch.full((), torch.nan, device=step.run.device)
        return totals.read(scale * step.run.ranks, step.run.ranks)

    def _own_loss(self, step: Step) -> Any:
        assert self.loss is not None
        with step.run.precision():
            return self.loss(step.run.module, step.batch)


class _Totals:
    """Sums of one pass of a model, forward and backward: for each convolution the gradient, and that of magnitudes."""

    def __init__(self, convolutions: Mapping[str, Any]) -> None:
        self._convolutions = convolutions
        self._of: dict[str, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In which what the convolutions are given and what the backward pass brings them is taken in."""
        handles = [
            m.register_forward_hook(partial(self._called, name), with_kwargs=True)
            for name, m in self._convolutions.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, divisor: Tensor, ranks: int) -> list[tuple[Tensor, Tensor]]:
        """The sums, over all ranks, divided by a number; zeros of a convolution that was not called."""
        sums = []
        for name, m in self._convolutions.items():
            like = next(p for p in m.parameters() if p.requires_grad)
            dtype = torch.promote_types(like.dtype, torch.float32)
            zeros = torch.zeros(_kernel_shape(m), dtype=dtype, device=like.device)
            sums += [value.to(dtype) for value in self._of.get(name, (zeros, zeros))]
        if ranks > 1:
            together = torch.cat([value.flatten() for value in sums])
            dist.all_reduce(together)
            parts = together.split([value.numel() for value in sums])
            sums = [part.view(value.shape) for part, value in zip(parts, sums, strict=True)]
        sums = [value / divisor for value in sums]
        return list(zip(sums[::2], sums[1::2], strict=True))

    def _called(self, name: str, module: Any, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if output.requires_grad:
            output.register_hook(partial(self._add, name, module, x.detach()))

    def _add(self, name: str, module: Any, x: Tensor, g: Tensor) -> None:
        """Take in the gradient of a call's output."""
        with torch.no_grad():
            batched = x.ndim == 2 + len(module.kernel_size)  # a single image has no dimension for it
            x, g = (x, g) if batched else (x[None], g[None])
            x = _padded(x, module)
            size = [
                (n - d * (k - 1) - 1) // s + 1
                for n, k, s, d in zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
            ]
            if [*g.shape[2:]] != size:
                raise ValueError(
                    f"GradientSums takes outputs of {name} to be of size {size}, by its kernel size, stride, padding "
                    f"and dilation, and they are of size {[*g.shape[2:]]}; choose other sites"
                )
            found = convolution_gradient_sums(
                x, g, _kernel_shape(module), stride=module.stride, dilation=module.dilation, groups=module.groups
            )
            earlier = self._of.get(name)
            self._of[name] = found if earlier is None else (earlier[0] + found[0], earlier[1] + found[1])


def _kernel_shape(convolution: Any) -> tuple[int, ...]:
    """Of the weight, which is not asked: a parametrization may compute it, and change its state."""
    m = convolution
    return (m.out_channels, m.in_channels // m.groups, *m.kernel_size)


def _padded(x: Tensor, convolution: Any) -> Tensor:
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    return F.pad(x, convolution._reversed_padding_repeated_twice, mode=mode)


def _row(layer: str, depth: int, of: str, channel: int | None, sums: float, magnitudes: float) -> dict[str, Any]:
    ratio = sums / magnitudes if magnitudes else None
    return {
        "layer": layer,
        "depth": depth,
        "of": of,
        "channel": channel,
        "sum": sums,
        "magnitudes": magnitudes,
        "ratio": ratio if channel is None else None,
        "channel_ratio": None if channel is None else ratio,
    }


def _patterns(what: str, given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else given
    if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"{what} must be a name or pattern of convolutions, or a list of these, not {given!r}")
    return tuple(names)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
