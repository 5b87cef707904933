"""The largest eigenvalue of the loss's Hessian, beside the one up to which the optimizer is stable."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from normzoo.callbacks._run.ranks import Reading
from normzoo.callbacks.measurement import Column, Figure, Measurement, Run, Sample, Step
from normzoo.callbacks.relative_loss import LossFunction, checked_losses
from normzoo.callbacks.schedule import Schedule, is_whole
from normzoo.functional.lanczos import Ritz, lanczos, ritz_values
from normzoo.functional.stability import adam_bound, adam_preconditioner, sgd_bound

_ONCE_ONLY = re.compile(
    r"differentiat\w+ twice|derivative for|second derivative|double backward|no autograd formula", re.IGNORECASE
)
_ADAM = (torch.optim.Adam, torch.optim.AdamW)
_RULES = {torch.optim.SGD: ("momentum", "dampening", "nesterov"), **dict.fromkeys(_ADAM, ("betas",))}


class Sharpness(Measurement):
    """Records the sharpness: the largest eigenvalue of the Hessian of the mini-batch's loss, over training.

    The Hessian H is that of the loss of the mini-batch being trained on (the last micro-batch, when accumulating), by
    the trainable parameters of the optimizer, before its step. Full-batch gradient descent of learning rate lr is
    stable up to a sharpness of 2/lr, and tends to train near it. **The bound is that of the full batch on a quadratic.
    The sharpness of a single mini-batch may exceed it throughout stable training**, the smaller the batch the more, and
    so may the mean over mini-batches: the largest eigenvalue of a mean of Hessians is at most the mean of their
    largest.

    A row of the record ``sharpness`` for each sampled step holds ``sharpness``, ``smallest`` and ``residual`` from a
    fixed number of Lanczos steps; ``bound``, what ``preconditioned`` is compared with; and ``preconditioned``, the
    largest eigenvalue of P^-1 (H + W). W is weight decay that is added to the gradient. P holds lr of the first
    parameter group over that of a parameter's own group, and for Adam and AdamW times its preconditioner with both bias
    corrections, as its last step left it (parameters that it has not moved yet count as fixed). For SGD of one learning
    rate and without weight decay ``preconditioned`` is ``sharpness``. The bound is 2/lr for ``torch.optim.SGD``, (2 + 2
    mu) / (lr (1 - dampening)) with momentum mu, (2 + 2 mu) / (lr (1 + 2 mu)) with Nesterov momentum, and (2 + 2 beta1)
    / (lr (1 - beta1)) for ``torch.optim.Adam`` and ``AdamW``, whose decoupled weight decay w would make it smaller by
    the factor 1 - lr w / 2. Both are null for other optimizers and classes derived from these, with ``maximize``, where
    groups differ in momentum or betas, and in an Adam's first step; the bound also at a learning rate of 0. Clipping is
    not taken into account. ``sharpness_mean`` and ``preconditioned_mean`` are means over the last samples of the
    optimizer, between which the parameters move. All are null where the loss or a coefficient is not finite. Logged as
    ``sharpness/sharpness`` and so on, with several optimizers followed by ``/optimizer_INDEX``.

    The run goes on as if nothing had been measured, as for :class:`RelativeLoss`: running statistics, too. The pass is
    in training mode with one draw of dropout. It runs without the Trainer's autocast, as second derivatives of half
    precision are mostly rounding, and without the scale of a GradScaler: products have the dtype of the parameters.
    Compiled modules run uncompiled, and attention by torch's function under its math backend; so the pass may need more
    memory than training does.

    **A sampled step costs** a forward pass, the backward pass with its graph, and for each product a backward pass
    through both; twice the products where P or W are not the same for all parameters. Meanwhile it holds the graph of
    both passes, a gradient, a copy of the module's parameters and buffers, and about five vectors of the size of the
    parameters, two more with P and W: the recurrence has three terms, and nothing is orthogonalized again, which may
    repeat eigenvalues and does not change the largest.

    Under DDP H is the mean over ranks: R ranks record what one rank would on the union of their batches, if these are
    of one size and the loss is a mean. Each product is averaged by an all-reduce as large as the gradient; a
    measurement that sends little otherwise has no other way to a Hessian of all batches. Batch statistics are each
    rank's own, so that with batch normalization the union's differ.

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        products: Lanczos steps, each with one Hessian-vector product. ``residual`` says whether they were enough.
        average: samples of an optimizer that the means are over.
        loss: ``loss(module, batch)``, a tensor of one value; or a list of such functions, one for each optimizer; by
            default the module's own ``training_step``.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: for arguments out of range; at setup for sharded parameters and other unsupported strategies, local
            SGD, manual optimization without ``loss``, and a ``training_step`` that takes ``dataloader_iter``; when
            training starts for a list of more or fewer losses than optimizers, and on several ranks for layers with
            statistics over all of them (``sync=True``, ``torch.nn.SyncBatchNorm``); in the first sampled step, which
            alone shows it, for checkpoints with ``use_reentrant=True``, sparse gradients and operations without a
            second derivative.
        TypeError: if ``loss`` returns anything else than a tensor of one value.

    Source: Cohen et al. 2021, arXiv 2103.00065, and 2022, arXiv 2207.14484.
    """

    name = "sharpness"
    columns = (
        Column("optimizer", "int", "index of the optimizer whose parameters the Hessian is of; 0 if there is one"),
        Column("products", "int", "Hessian-vector products behind each eigenvalue"),
        Column(
            "sharpness",
            "float",
            "largest eigenvalue of the Hessian H of the mini-batch's loss, from below; null where either is not finite",
            logged=True,
        ),
        Column("smallest", "float", "smallest eigenvalue of H, from above and less exact"),
        Column("residual", "float", "error bound: some eigenvalue of H lies within this distance of `sharpness`"),
        Column(
            "preconditioned",
            "float",
            "largest eigenvalue of P^-1 (H + W), P the optimizer's preconditioner, W its weight decay; `sharpness` for "
            "SGD with one learning rate and none; null where unknown",
            logged=True,
        ),
        Column(
            "preconditioned_residual",
            "float",
            "error bound: some eigenvalue of P^-1 (H + W) lies within this distance of `preconditioned`",
        ),
        Column("lr", "float", "learning rate of the first parameter group that trains"),
        Column(
            "bound",
            "float",
            "`preconditioned` up to which full-batch training is stable on a quadratic; that of a mini-batch may "
            "exceed it in stable training; null where unknown",
            logged=True,
        ),
        Column(
            "sharpness_mean",
            "float",
            "mean of `sharpness` over the last `average` (10) samples of this optimizer, this one included",
            logged=True,
        ),
        Column("preconditioned_mean", "float", "mean of `preconditioned` over the same samples", logged=True),
    )
    figures = (
        Figure(
            "Sharpness of mini-batches",
            "line",
            x="step",
            y="sharpness",
            lines=("optimizer",),
            y_scale="log",
            y_label="largest eigenvalue of H",
        ),
        Figure(
            "Preconditioned sharpness of mini-batches, and the full-batch bound",
            "line",
            x="step",
            y="preconditioned",
            lines=("optimizer",),
            y_scale="log",
            level="bound",
            y_label="largest eigenvalue of P⁻¹(H + W)",
        ),
    )
    needs = frozenset({"extra_pass"})
    reduce = None  # products are averaged one by one, so that all ranks hold the same coefficients

    def __init__(
        self,
        every_n_steps: int | Schedule = 1000,
        *,
        products: int = 10,
        average: int = 10,
        loss: LossFunction | Sequence[LossFunction] | None = None,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        for name, value in {"products": products, "average": average}.items():
            if not (is_whole(value) and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        self.products, self.average = products, average
        self.loss: LossFunction | list[LossFunction] | None = checked_losses(loss)
        self._recent: dict[int, list[list[float | None]]] = {}  # sharpness and preconditioned, by optimizer
        self._several = False
        super().__init__(every_n_steps, dirpath=dirpath, label=label)

    def check(self, run: Run) -> None:
        """Refuse local SGD, and a ``training_step`` that cannot be evaluated once more, if it is the loss."""
        if run.averages_locally:
            raise ValueError(
                "Sharpness measures the loss at parameters that all ranks share, and under local SGD each rank has its "
                "own; train with DDP, or leave it out"
            )
        if self.loss is None:
            run.check_training_step("Sharpness", "pass loss=, a function of (module, batch)")

    def start(self, run: Run) -> None:
        """Refuse a list of losses that does not fit the optimizers, and statistics of all ranks."""
        several = len(run.optimizers)
        if isinstance(self.loss, list) and len(self.loss) != several:
            raise ValueError(
                f"Sharpness takes one loss for all optimizers or one for each; {len(self.loss)} were given, and the "
                f"number of optimizers is {several}"
            )
        layers = {name: m for name, m in run.module.named_modules() if _is_synchronized(m)}
        if layers and run.ranks > 1:
            raise ValueError(
                f"Sharpness differentiates the loss twice, and {next(iter(layers))} takes statistics over all ranks, "
                "of which there is no second derivative; train it with statistics of each rank, or leave Sharpness out"
            )
        self._several = several > 1

    def measure(self, step: Step) -> None:
        """Find the coefficients of the Lanczos recurrence, for H and for the preconditioned one."""
        groups = _trainable(step.optimizer)
        params = [p for group in groups for p in group["params"]]
        if not params:
            return  # all are frozen
        rule = _rule(step.optimizer, groups)
        with (
            step.extra_passes() as one_pass,
            one_pass(),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            sdpa_kernel(SDPBackend.MATH),
        ):
            hessian = _Hessian(self._loss(step), params, step.run.ranks)
            start = hessian.random(step.number)
            alpha, beta = lanczos(hessian.product, start, self.products)
            values = {"plain": torch.stack([alpha, beta])}
            if rule is not None and isinstance(rule.matrix, _Matrix):
                product = partial(rule.matrix.product, hessian.product)
                values["preconditioned"] = torch.stack(lanczos(product, start, self.products))
        if rule is not None and not isinstance(rule.matrix, _Matrix):
            # The recurrence of H + w I is that of H, shifted
            values["preconditioned"] = torch.stack([alpha + rule.matrix, beta])
        lr = torch.as_tensor(groups[0]["lr"], dtype=torch.float64).clone()  # a scheduler may change it in place
        bound = Reading(rule.bound) if rule is not None else None
        self.send(step, values, lr=Reading(lr), bound=bound)

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The row of a sample."""
        plain = ritz_values(*values["plain"])
        unknown = Ritz(math.nan, math.nan, math.nan)
        preconditioned = ritz_values(*values["preconditioned"]) if "preconditioned" in values else unknown
        bound = sample.about["bound"]
        both = [_known(plain.largest), _known(preconditioned.largest)]
        recent = self._recent[sample.optimizer] = [*self._recent.get(sample.optimizer, []), both][-self.average :]
        means = [_mean(values) for values in zip(*recent, strict=True)]
        row = {
            "optimizer": sample.optimizer,
            "products": self.products,
            "sharpness": both[0],
            "smallest": _known(plain.smallest),
            "residual": _known(plain.residual),
            "preconditioned": both[1],
            "preconditioned_residual": _known(preconditioned.residual),
            "lr": sample.about["lr"].read().item(),
            "bound": None if bound is None else _known(bound.read().item()),
            "sharpness_mean": means[0],
            "preconditioned_mean": means[1],
        }
        return [row]

    def suffix(self, row: Mapping[str, Any]) -> str:
        """The optimizer, if there are several."""
        return f"/optimizer_{row['optimizer']}" if self._several else ""

    def state_dict(self) -> dict[str, Any]:
        """The last values of each optimizer, and the steps that each has made."""
        recent = {str(i): [list(sample) for sample in samples] for i, samples in self._recent.items()}
        return {**super().state_dict(), **({"recent": recent} if recent else {})}

    def restore(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().restore(state_dict)
        recent = state_dict.get("recent", {})
        self._recent = {int(i): [list(sample) for sample in samples] for i, samples in recent.items()}

    def forget(self) -> None:
        """Drop the values of another run."""
        super().forget()
        self._recent = {}

    def _loss(self, step: Step) -> Tensor | None:
        run, module = step.run, step.run.module
        own = self.loss[step.index] if isinstance(self.loss, list) else self.loss
        if own is not None:
            with run.precision(), torch.autocast(run.device.type, enabled=False):
                return _one_value(own(module, step.batch))
        training_step = module.training_step

        @wraps(training_step)
        def without_autocast(*args: Any) -> Any:
            with torch.autocast(run.device.type, enabled=False):
                return training_step(*args)

        module.training_step = without_autocast  # until the pass ends, which puts back all attributes
        loss = step.training_loss()
        return None if loss is None else _one_value(loss)


class _Hessian:
    """The Hessian of a loss by parameters, as products with vectors of all their values, averaged over ranks.

    Real and imaginary parts of complex parameters are values of their own. Without a loss, or with one that is not
    finite, all is NaN.

    Raises:
        ValueError: if the graph of the loss cannot be differentiated twice.
    """

    def __init__(self, loss: Tensor | None, params: Sequence[Tensor], ranks: int) -> None:
        self._params, self._ranks = params, ranks
        self._not_finite = torch.nan if loss is None else 0 * loss.detach()  # else 0
        self._sizes = [_real(p).numel() for p in params]
        self._gradients: Sequence[Tensor | None] = [None] * len(params)
        if loss is not None:
            _check_graph(loss)
            with _second_derivatives():
                found = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            self._gradients = [None if g is None else _real(g) for g in found]
            # With inputs given, torch would pass over these nodes in silence
            if any(node.name().endswith("autograd::Error") for node in _nodes(self._gradients)):
                raise _once_only("a torch.autograd.Function whose backward is marked with once_differentiable")
        if any(g is not None and g.is_sparse for g in self._gradients):
            raise ValueError(
                "Sharpness differentiates gradients, and cannot differentiate sparse ones, as of "
                "Embedding(sparse=True); make the layer with sparse=False, or leave Sharpness out"
            )

    def random(self, seed: int) -> Tensor:
        """A vector of Gaussian values, the same on all ranks, that leaves the run's random streams alone."""
        device = self._params[0].device
        dtype = torch.float32
        for p in self._params:
            dtype = torch.promote_types(dtype, _real(p).dtype)
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(sum(self._sizes), generator=generator, device=device, dtype=dtype)

    def product(self, v: Tensor) -> Tensor:
        """H v, in the dtype of v."""
        vectors = [part.view_as(_real(p)) for part, p in zip(v.split(self._sizes), self._params, strict=True)]
        # Other gradients are constants
        pairs = [(g, u) for g, u in zip(self._gradients, vectors, strict=True) if g is not None and g.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(vectors)
        if pairs:
            with _second_derivatives():
                found = torch.autograd.grad(
                    [g for g, _ in pairs],
                    self._params,
                    [u.to(g.dtype) for g, u in pairs],
                    retain_graph=True,
                    allow_unused=True,
                )
        parts = [torch.zeros_like(u) if h is None else _real(h) for h, u in zip(found, vectors, strict=True)]
        result = torch.cat([part.flatten().to(v.dtype) for part in parts])
        result += self._not_finite
        if self._ranks > 1:
            dist.all_reduce(result)
            result /= self._ranks
        return result


class _Matrix(NamedTuple):
    """P^-1/2 and W, diagonal, as vectors of all parameters' values."""

    root: Tensor
    decay: Tensor

    def product(self, hessian: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """P^-1/2 (H + W) P^-1/2 v, whose eigenvalues are those of P^-1 (H + W)."""
        v = self.root * v
        return self.root * (hessian(v) + self.decay * v)


class _Rule(NamedTuple):
    """When an optimizer is stable: the bound, and what it bounds the eigenvalues of.

    Attributes:
        bound: 0-d float64.
        matrix: P and W; or, if P is 1, the same weight decay of all parameters.
    """

    bound: Tensor
    matrix: _Matrix | float | Tensor


def _trainable(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups that have trainable parameters, with these alone."""
    groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in optimizer.param_groups]
    return [g for g in groups if g["params"]]


def _rule(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> _Rule | None:
    """The rule of an optimizer, computed without a host read; None if it is not known."""
    kind = type(optimizer)
    if kind not in _RULES or any(g["maximize"] for g in groups):
        return None
    first, others = groups[0], groups[1:]
    if any(g[name] != first[name] for g in others for name in _RULES[kind]):
        return None
    lr = torch.as_tensor(first["lr"], dtype=torch.float64)
    if kind is torch.optim.SGD:
        bound = sgd_bound(lr, first["momentum"], first["dampening"], first["nesterov"])
        if all(_same(g[name], first[name]) for g in others for name in ("lr", "weight_decay")):
            return _Rule(bound, first["weight_decay"])
    else:
        if not any(optimizer.state.get(p) for g in groups for p in g["params"]):
            return None  # no step has been made yet
        bound = adam_bound(lr, first["betas"][0])
    roots, decays = [], []
    for group in groups:
        scale = torch.as_tensor(group["lr"], dtype=torch.float64) / lr
        decoupled = kind is torch.optim.AdamW or group.get("decoupled_weight_decay", False)
        for p in group["params"]:
            root = torch.ones_like(_real(p), dtype=torch.promote_types(p.real.dtype, torch.float32))
            if kind in _ADAM:
                root = _inverse_root(optimizer.state.get(p), group, root)
            roots.append((root * scale.sqrt()).flatten())
            decays.append((torch.zeros_like(root) + (0 if decoupled else group["weight_decay"])).flatten())
    return _Rule(bound, _Matrix(torch.cat(roots), torch.cat(decays)))


def _inverse_root(state: Mapping[str, Any] | None, group: Mapping[str, Any], like: Tensor) -> Tensor:
    """P^-1/2 of a parameter under Adam; 0 if it has not been moved yet."""
    if not state:
        return torch.zeros_like(like)
    second_moment = _real(state.get("max_exp_avg_sq", state["exp_avg_sq"])).to(like.dtype)
    beta1, beta2 = group["betas"]
    return adam_preconditioner(second_moment, state["step"], beta1, beta2, group["eps"]).rsqrt()


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two settings are known to be equal, which comparing tensors would wait for."""
    return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)


def _check_graph(loss: Tensor) -> None:
    """Raise a ValueError for a loss without a graph, or with reentrant checkpoints in it."""
    if loss.grad_fn is None:
        raise ValueError(
            "Sharpness differentiates the loss, and it was given one that does not depend on parameters; compute it "
            "with gradients enabled, or leave Sharpness out"
        )
    if any("CheckpointFunction" in node.name() for node in _nodes([loss])):
        raise ValueError(
            "Sharpness differentiates the loss twice, which checkpoints with use_reentrant=True do not support; "
            "pass use_reentrant=False, or leave Sharpness out"
        )


def _nodes(tensors: Iterable[Tensor | None]) -> Iterator[Any]:
    """All operations in the graphs of tensors."""
    seen: set[Any] = set()
    left: list[Any] = [t.grad_fn for t in tensors if t is not None]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            yield node


def _once_only(what: str) -> ValueError:
    return ValueError(
        f"Sharpness differentiates the loss twice, and an operation in it can be differentiated only once ({what}); "
        "write it with operations of torch, or leave Sharpness out"
    )


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Turns the errors of torch about a missing second derivative into one."""
    try:
        yield
    except RuntimeError as error:
        if not _ONCE_ONLY.search(str(error)):
            raise
        raise _once_only(str(error).splitlines()[0].rstrip(".")) from error


def _one_value(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f"Sharpness needs a loss that is a tensor of one value, not {found}")
    return loss.reshape(())


def _real(t: Tensor) -> Tensor:
    """The real and imaginary parts of a complex tensor along a last dimension; another as it is."""
    return torch.view_as_real(t) if t.is_complex() else t


def _is_synchronized(module: nn.Module) -> bool:
    """Whether a layer takes statistics over all ranks."""
    return isinstance(module, nn.SyncBatchNorm) or getattr(module, "sync", False) is True


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
