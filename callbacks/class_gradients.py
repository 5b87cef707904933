"""The gradient at the logits, of each image and class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.callbacks._run.facts import plain_name
from normzoo.callbacks._run.gradients import check_differentiable
from normzoo.callbacks._run.modules import scripted_modules
from normzoo.callbacks.measurement import Column, Figure, Measurement, Run, Sample, Step
from normzoo.callbacks.relative_loss import LossFunction
from normzoo.callbacks.schedule import Schedule, is_whole
from normzoo.functional.class_gradients import images_led

_NO_LABEL = -1


class ClassGradients(Measurement):
    """Records the gradient of the loss at the logits, and in how many images one class alone is pushed down.

    Cross entropy, the mean over B images, has the gradient (softmax - target) / B: from 0 to 1/B at a wrong class, from
    -1/B to 0 at the true one. A network whose outputs hardly depend on the image has a gradient near 1/B at one class
    in nearly every image. ``led`` is the largest share of images of which this is true: a class leads an image where
    the gradient is at least ``near / B``. For a loss that is not a mean over images it means nothing.

    A row of the record ``class_gradients`` for each sampled step, image and class holds ``gradient``. ``led``, a value
    of the whole sample, stands in its first row, and is logged as ``class_gradients/led``.

    The mini-batch is the one being trained on (the last micro-batch, when accumulating), and the gradient that of its
    loss, neither clipped nor scaled. The logits are what the module ``logits`` returns at its first call. They come
    from a forward pass beside the run, in training mode, which leaves no trace in it (as those of
    :class:`RelativeLoss`); the backward pass goes from the loss to the logits, and no further. Labels are the second
    part of the batch, where it has one whole number for each image.

    Under DDP the rows of the ranks follow each other, and the loss is the mean over ranks, as B is the number of images
    of all. Of several optimizers the steps of the first are sampled.

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        logits: the name of the module that returns the logits, (images, classes); by default the last
            ``torch.nn.Linear`` of the model.
        images: the most images of a rank that have rows; ``led`` counts all.
        near: a class leads an image from this multiple of 1/B on: above 0.5, at most 1.
        loss: ``loss(module, batch)``, a tensor of one value that can be differentiated, without gradient scaling; by
            default the module's own ``training_step``.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: for arguments out of range; at setup for strategies other than one device and DDP, for manual
            optimization without ``loss``, for a ``training_step`` that takes ``dataloader_iter``, and if there is no
            such module; at a sampled step for logits that are not of shape (images, classes), or on which the loss does
            not depend.
        TypeError: for a loss that is no function, or that returns anything else than a tensor of one value.

    Source: Bjorck et al. 2018, arXiv 1806.02375, figure 6.
    """

    name = "class_gradients"
    row = "one sampled step, image of the mini-batch, and class"
    columns = (
        Column("image", "int32", "place in the mini-batch, from 0; the images of the ranks follow each other"),
        Column("class", "int32", "index of the class"),
        Column("gradient", "float", "gradient of the loss at the logit of this class"),
        Column("true", "bool", "whether it is the true class; null where the batch has no labels"),
        Column(
            "led",
            "float",
            "largest share of the images in which one and the same class has a gradient of at least `near` (0.9) over "
            "the number of images; in the first row of a sample, null in the others",
            logged=True,
        ),
    )
    figures = (
        Figure(
            "Gradient at the logits",
            "heat map",
            x="class",
            y="image",
            z="gradient",
            z_scale="diverging",
            y_label="image of the mini-batch",
            z_label="gradient of the loss",
        ),
        Figure(
            "Images led by one class",
            "line",
            x="step",
            y="led",
            y_range=(0.0, 1.0),
            y_label="largest share of images led by one class",
        ),
    )
    needs = frozenset({"batch", "extra_pass"})
    reduce = "gather"

    def __init__(
        self,
        every_n_steps: int | Schedule = 500,
        *,
        logits: str | None = None,
        images: int = 128,
        near: float = 0.9,
        loss: LossFunction | None = None,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        if not (is_whole(images) and images >= 1):
            raise ValueError(f"images must be a whole number of at least 1, not {images!r}")
        if not 0.5 < near <= 1:  # one class at most leads an image
            raise ValueError(f"near must be above 0.5 and at most 1, not {near!r}")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be a function of (module, batch), or None, not {loss!r}")
        self.logits, self.images, self.near, self.loss = logits, images, near, loss
        self._name, self._module = "", nn.Module()
        super().__init__(every_n_steps, dirpath=dirpath, label=label)

    def check(self, run: Run) -> None:
        """Refuse a model without such a module, and a ``training_step`` that cannot be evaluated once more."""
        if self.loss is None:
            run.check_training_step("ClassGradients", "pass loss=, a function of (module, batch)")
        if run.complete:
            self._find(run)

    def start(self, run: Run) -> None:
        """Find the module whose outputs are the logits."""
        self._name, self._module = self._find(run)

    def samples(self, run: Run, index: int, made: int) -> bool:
        """The steps of the first optimizer."""
        return index == 0 and self.schedule(made)

    def measure(self, step: Step) -> dict[str, Tensor]:
        """The gradient of up to ``images`` images, their labels, and how many images each class leads."""
        gradient = self._gradient(step) / step.run.ranks
        n, kept = len(gradient), gradient[: self.images]
        labels = _labels(step.batch, n)
        shown = kept.new_full((self.images, kept.shape[1]), torch.nan)
        shown[: len(kept)] = kept
        numbers = torch.full((self.images,), _NO_LABEL, dtype=torch.int64, device=kept.device)
        if labels is not None:
            numbers[: len(kept)] = labels[: self.images].to(kept.device)
        return {
            "gradient": shown,
            "labels": numbers,
            "rows": torch.full((), len(kept), device=kept.device),
            "images": torch.full((), n, device=kept.device),
            "led": images_led(gradient, n * step.run.ranks, self.near),
        }

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The rows of all images, rank after rank."""
        led: float | None = values["led"].sum(0).max().item() / values["images"].sum().item()
        rows = []
        image = 0
        of_ranks = zip(values["gradient"], values["labels"].tolist(), values["rows"].tolist(), strict=True)
        for gradient, labels, count in of_ranks:
            for by_class, true in zip(gradient[:count].tolist(), labels, strict=False):
                for number, g in enumerate(by_class):
                    known = None if true == _NO_LABEL else number == true
                    rows.append({"image": image, "class": number, "gradient": g, "true": known, "led": led})
                    led = None
                image += 1
        return rows

    def _find(self, run: Run) -> tuple[str, nn.Module]:
        modules = run.named_modules()
        linear = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
        if self.logits is None and not linear:
            raise ValueError(
                "ClassGradients takes what the last torch.nn.Linear returns for the logits, and the model has none; "
                "pass logits=, the name of the module that returns them"
            )
        name = plain_name(self.logits) if self.logits is not None else linear[-1]
        if name not in modules:
            raise ValueError(f"logits names the module {name!r}, and there is none; there are {', '.join(modules)}")
        module = modules[name]
        if module in scripted_modules(run.module):
            raise ValueError(
                f"ClassGradients cannot listen to {name}: torch.jit has made it, and runs no hooks; train what it was "
                "made from"
            )
        return name, module

    def _gradient(self, step: Step) -> Tensor:
        """(N, C) gradient of the mini-batch's loss on this rank."""
        seen: list[Tensor] = []

        def cut(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            """Let the loss depend on a leaf with the values of the logits: its gradient ends there."""
            if seen:
                return None
            if not (isinstance(output, Tensor) and output.is_floating_point() and output.ndim == 2):
                found = (
                    f"a {output.dtype} of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output)
                )
                raise ValueError(
                    f"ClassGradients needs logits of shape (images, classes), and {self._name} returns {found}; pass "
                    "logits=, the name of the module that returns them"
                )
            seen.append(output.detach().requires_grad_())
            return seen[0].clone()  # which may be changed in place

        with (
            step.extra_passes() as one_pass,
            one_pass(),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),  # what the compiler has made runs no hooks set later
        ):
            with self._module.register_forward_hook(cut):
                loss = step.training_loss() if self.loss is None else self._own_loss(step)
            if not seen:
                raise ValueError(
                    f"ClassGradients takes what {self._name} returns for the logits, and the loss was computed without "
                    "it; pass logits=, the name of the module that returns them"
                )
            if loss is None:  # of training_step: there is none for this batch
                return torch.full_like(seen[0].detach(), torch.nan)
            check_differentiable(loss, "ClassGradients")
            scale = torch.ones_like(loss.detach())
            # Half precision takes gradients of a scaled loss, as the run does
            scale = scale if step.run.scaler is None else step.run.scaler.scale(scale)
            [gradient] = torch.autograd.grad(loss, seen, grad_outputs=scale, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"ClassGradients takes what {self._name} returns for the logits, and the loss does not depend on it; "
                "pass logits=, the name of the module that returns them"
            )
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale

    def _own_loss(self, step: Step) -> Any:
        assert self.loss is not None
        with step.run.precision():
            return self.loss(step.run.module, step.batch)


def _labels(batch: Any, images: int) -> Tensor | None:
    """The second part of a batch, if it has one whole number for each image."""
    labels = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        return None
    return labels if labels.shape == (images,) else None
