"""The sharpness against the dense Hessian, on one rank and on several, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, TwoOptimizers, loader, trainer
from ranks import run_function
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import normzoo
from normzoo import load_run
from normzoo.callbacks import Sharpness

FEW = 3  # steps of most fits


class Net(pl.LightningModule):
    """A network in float64 whose batches, and parameters before each step, are kept."""

    def __init__(self, net: nn.Module, optimizer: str = "sgd", **options: Any) -> None:
        super().__init__()
        self.net, self.optimizer, self.options = net.double(), optimizer, options
        self.kept: list[Any] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0].double()), batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        values = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        states = [{k: v.clone() for k, v in optimizer.state[p].items() if v is not None} for p in self.net.parameters()]
        self.kept.append((values, states))

    def configure_optimizers(self) -> Any:
        groups: Any = self.net.parameters()
        if "several" in self.options:
            settings = self.options["several"]
            groups = [{"params": [p], **settings[i % len(settings)]} for i, p in enumerate(groups)]
        options = {"lr": 0.05, **{k: v for k, v in self.options.items() if k != "several"}}
        return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer](
            groups, **options
        )


def small() -> nn.Module:
    """Batch norm in training mode between two linear layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))


def data(count: int = 64, batch_size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, generator=generator)
    y = (x[:, 0] + 0.3 * torch.randn(count, generator=generator) > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def fit(folder: Path, module: Any, *callbacks: Any, batches: Any = None, **options: Any) -> Any:
    options = {"max_steps": FEW, "callbacks": [*callbacks], **options}
    trainer(str(folder), **options).fit(module, batches if batches is not None else data())
    return load_run(folder / "log")["sharpness"]


def dense(net: nn.Module, values: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The Hessian of the loss of a batch at these parameters, by differentiating twice."""
    shapes = [p.shape for p in values.values()]
    buffers = {name: b.clone() for name, b in net.named_buffers()}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        named = {name: part.view(shape) for name, part, shape in zip(values, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, {**named, **buffers}, batch[0].double()), batch[1])

    flat = torch.cat([v.flatten() for v in values.values()])
    return torch.autograd.functional.hessian(loss, flat)


def test_the_twin_is_that_of_torch_func_on_batch_norm_by_its_formula() -> None:
    """With F.batch_norm itself torch.func.hessian is off from finite differences in the block of weight and input."""
    torch.manual_seed(0)
    net, (x, y) = small().double(), next(iter(data()))
    named = {name: p.detach() for name, p in net.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        h = x.double() @ p["1.weight"].T
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + net[2].eps).sqrt() * p["2.weight"] + p["2.bias"]
        return F.cross_entropy(h.tanh() @ p["4.weight"].T + p["4.bias"], y)

    blocks = torch.func.hessian(loss)(named)
    sizes = {name: p.numel() for name, p in named.items()}
    rows = [torch.cat([blocks[a][b].reshape(sizes[a], sizes[b]) for b in sizes], 1) for a in sizes]
    torch.testing.assert_close(torch.cat(rows), dense(net, named, (x, y)), rtol=1e-9, atol=1e-12)


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"lr": 0.1, "momentum": 0.9}),
    "nesterov with decay": ("sgd", {"momentum": 0.5, "nesterov": True, "weight_decay": 0.3}),
    "sgd of several groups": ("sgd", {"several": [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.4}, {"lr": 0.02}]}),
    "adam": ("adam", {"betas": (0.8, 0.95), "weight_decay": 0.2, "eps": 1e-4}),
    "adam of several groups": ("adam", {"amsgrad": True, "several": [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.03}]}),
    "adamw": ("adamw", {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_it_is_the_largest_eigenvalue_of_the_dense_hessian(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    name, options = OPTIMIZERS[case]
    module = Net(small(), name, **options)
    [optimizer] = [module.configure_optimizers()]
    record = fit(tmp_path, module, Sharpness(1, products=40, average=2))
    assert record["step"].tolist() == [0, 1, 2]
    batches = [*data()]
    expected = []
    for i, (values, states) in enumerate(module.kept):
        hessian = dense(module.net, values, batches[i])
        spectrum = torch.linalg.eigvalsh(hessian)
        row = record.loc[i]
        assert row["sharpness"] == pytest.approx(spectrum[-1].item(), rel=1e-9)
        assert row["smallest"] == pytest.approx(spectrum[0].item(), rel=1e-6)
        assert row["residual"] < 1e-6
        scales, decays = [], []
        by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        groups = [by_id[id(p)] for p in optimizer_parameters(optimizer)]
        for value, state, group in zip(values.values(), states, groups, strict=True):
            p = torch.full_like(value, groups[0]["lr"] / group["lr"])
            if name != "sgd" and state:
                beta1, beta2 = group["betas"]
                t = state["step"].item()
                v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
                p *= (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + group["eps"])
            scales.append(1 / p.flatten())
            decays.append(torch.full_like(scales[-1], 0.0 if name == "adamw" else group["weight_decay"]))
        matrix = torch.diag(torch.cat(scales)) @ (hessian + torch.diag(torch.cat(decays)))  # not symmetric
        if name == "sgd" or i > 0:
            largest = torch.linalg.eigvals(matrix).real.max().item()
            assert row["preconditioned"] == pytest.approx(largest, rel=1e-8)
            expected.append(largest)
        else:
            assert math.isnan(row["preconditioned"])
    last = record.iloc[-1]
    assert last["sharpness_mean"] == pytest.approx(record["sharpness"][-2:].mean())
    assert last["preconditioned_mean"] == pytest.approx(sum(expected[-2:]) / 2)
    assert last["products"] == 40


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (("sgd", {"lr": 0.1}), 20.0),
        (("sgd", {"lr": 0.1, "momentum": 0.9}), 38.0),
        (("sgd", {"lr": 0.1, "momentum": 0.5, "nesterov": True}), 15.0),
        (("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}), 76.0),
        (("adam", {"lr": 0.1}), 380.0),
        (("adamw", {"lr": torch.tensor(0.1)}), 380.0),
        (("sgd", {"lr": torch.tensor(0.1)}), 20.0),
        (("sgd", {"lr": 0.0}), None),
        (("sgd", {"lr": 0.1, "maximize": True}), None),
        (("sgd", {"several": [{"momentum": 0.9}, {"momentum": 0.5}]}), None),
    ],
    ids=str,
)
def test_the_bound_is_that_of_the_optimizer(tmp_path: Path, case: tuple[str, dict[str, Any]], bound: Any) -> None:
    record = fit(tmp_path, Net(small(), case[0], **case[1]), Sharpness(1, products=2), max_steps=2)
    found = record["bound"].iloc[-1]
    assert math.isnan(found) if bound is None else found == pytest.approx(bound, rel=1e-6)
    assert record["lr"].iloc[-1] == pytest.approx(float(case[1].get("lr", 0.05)), rel=1e-6)
    assert record["sharpness"].notna().all()
    if "maximize" in case[1] or "several" in case[1]:
        assert record["preconditioned"].isna().all()


def test_another_optimizer_has_sharpness_and_no_bound(tmp_path: Path) -> None:
    class Other(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.RMSprop(self.parameters(), lr=0.01)

    record = fit(tmp_path, Other(small()), Sharpness(1))
    assert record[["bound", "preconditioned", "preconditioned_mean"]].isna().all(axis=None)
    assert record["sharpness"].notna().all()


def test_frozen_parameters_are_left_out_with_their_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Net(small(), several=[{"lr": 9.0}, {"lr": 0.1}, {"lr": 0.1}, {"lr": 0.1}, {"lr": 0.1}])
    module.net[1].weight.requires_grad_(False)
    record = fit(tmp_path, module, Sharpness(1, products=30), max_steps=1)
    values, _ = module.kept[0]
    hessian = dense(module.net, values, next(iter(data())))[12:, 12:]
    assert record["sharpness"].tolist() == pytest.approx([torch.linalg.eigvalsh(hessian)[-1].item()], rel=1e-9)
    assert record["preconditioned"].tolist() == record["sharpness"].tolist()
    assert record["bound"].tolist() == [20.0]


class Quadratic(nn.Module):
    """x H x / 2 of the parameters alone."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.x = nn.Parameter(torch.ones(len(matrix), dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.x @ self.matrix @ self.x / 2


@pytest.mark.parametrize(
    "spectrum", [[-2.0], [3.0], [0.0, 0.0], [-1.0, -5.0, -5.0], [7.0, 7.0, -7.0], [1e-3, 2e4]], ids=str
)
def test_quadratics_are_exact_in_a_plain_loop(tmp_path: Path, spectrum: list[float]) -> None:
    model = Quadratic(torch.diag(torch.tensor(spectrum, dtype=torch.float64)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    measured = Sharpness(1, products=len(spectrum) + 1, loss=lambda module, batch: module())
    with normzoo.watch(model, optimizer, measured, dirpath=tmp_path) as watching:
        for _ in range(2):
            watching.batch(None)
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    record = load_run(tmp_path)["sharpness"]
    assert record["sharpness"].tolist() == pytest.approx([max(spectrum)] * 2, abs=1e-9 * max(map(abs, spectrum)))
    assert record["smallest"].tolist() == pytest.approx([min(spectrum)] * 2, abs=1e-9 * max(map(abs, spectrum)))


def test_a_loss_linear_in_the_parameters_has_sharpness_zero(tmp_path: Path) -> None:
    linear = lambda module, batch: sum(p.sum() for p in module.parameters())  # noqa: E731
    assert fit(tmp_path, Net(small()), Sharpness(1, loss=linear))["sharpness"].tolist() == [0.0] * FEW


def test_parameters_of_complex_numbers_count_as_their_two_parts(tmp_path: Path) -> None:
    model = nn.Module()
    model.z = nn.Parameter(torch.tensor([1 + 2j, -1j], dtype=torch.complex128))
    curvature = torch.tensor([[3.0, 5.0], [1.0, 2.0]], dtype=torch.float64)
    value = lambda module, batch=None: (curvature * torch.view_as_real(module.z) ** 2).sum() / 2  # noqa: E731
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with normzoo.watch(model, optimizer, Sharpness(1, products=4, loss=value), dirpath=tmp_path) as watching:
        for _ in range(2):
            watching.batch(None)
            optimizer.zero_grad()
            value(model).backward()
            optimizer.step()
    record = load_run(tmp_path)["sharpness"]
    assert record["sharpness"].tolist() == pytest.approx([5.0, 5.0])
    # After one step P is the magnitude of the first gradient times 1 - beta1
    gradient = curvature * torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    largest = (curvature / (0.1 * (gradient.abs() + 1e-8))).nan_to_num(posinf=0)
    assert record["preconditioned"].iloc[-1] == pytest.approx(largest.max().item(), rel=1e-4)


# What the pass leaves alone


def test_running_statistics_and_random_streams_are_not_moved(tmp_path: Path) -> None:
    def trained(folder: Path, *callbacks: Any) -> dict[str, Tensor]:
        pl.seed_everything(7)
        module = SmallNet()
        trainer(str(folder), max_steps=4, callbacks=[*callbacks]).fit(module, loader())
        return {**module.state_dict(), "stream": torch.get_rng_state()}

    without, measured = trained(tmp_path / "a"), trained(tmp_path / "b", Sharpness(1))
    assert without.keys() == measured.keys()
    assert all(torch.equal(without[name], measured[name]) for name in without)


def test_autocast_and_the_loss_scale_do_not_enter(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    found = []
    for name, plugins in (
        ("plain", None),
        ("bf16", [MixedPrecision("bf16-mixed", "cpu")]),
        ("fp16", [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]),
    ):
        pl.seed_everything(1)
        record = fit(tmp_path / name, SmallNet(), Sharpness(1), batches=loader(), max_steps=1, plugins=plugins)
        found.append(record["sharpness"].tolist())
    assert found[0] == found[1] == found[2]


def test_the_last_micro_batch_is_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Net(small())
    record = fit(tmp_path, module, Sharpness(1, products=40), accumulate_grad_batches=2, max_steps=2)
    batches = [*data()]
    for i, (values, _) in enumerate(module.kept):
        largest = torch.linalg.eigvalsh(dense(module.net, values, batches[2 * i + 1]))[-1].item()
        assert record["sharpness"][i] == pytest.approx(largest, rel=1e-9)


class Attention(nn.Module):
    """Self-attention over the four numbers of a sample, by torch's function, with checkpoints or without."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 2)
        self.reentrant = reentrant

    def attend(self, h: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(h, h, h)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[..., None]).unflatten(-1, (2, 4)).transpose(1, 2)
        h = self.attend(h) if self.reentrant is None else checkpoint(self.attend, h, use_reentrant=self.reentrant)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("reentrant", [None, False])
def test_attention_and_checkpoints_that_are_not_reentrant_are_measured(tmp_path: Path, reentrant: bool | None) -> None:
    torch.manual_seed(0)
    module = Net(Attention(reentrant))
    record = fit(tmp_path, module, Sharpness(1, products=40), max_steps=1)
    values, _ = module.kept[0]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        module.net.reentrant = None
        largest = torch.linalg.eigvalsh(dense(module.net, values, next(iter(data()))))[-1].item()
    assert record["sharpness"].tolist() == pytest.approx([largest], rel=1e-8)


@pytest.mark.slow
def test_compiled_modules_are_measured_uncompiled(tmp_path: Path) -> None:
    found = []
    for name in ("plain", "compiled"):
        torch.manual_seed(0)
        module = Net(small())
        if name == "compiled":
            module.net.compile()
        found.append(fit(tmp_path / name, module, Sharpness(1), max_steps=2)["sharpness"].tolist())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# Refusals


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * g


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.Embedding(5, 2, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.bag(x[:, 0].abs().long().clamp_max(4))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            Attention(reentrant=True),
            "which checkpoints with use_reentrant=True do not support; pass use_reentrant=False",
        ),
        (
            nn.Sequential(nn.Linear(4, 2), Squares()),
            "an operation in it can be differentiated only once .*; write it with",
        ),
        (Bags(), r"cannot differentiate sparse ones, as of Embedding\(sparse=True\)"),
    ],
    ids=["reentrant", "once", "sparse"],
)
def test_what_has_no_second_derivative_is_refused_in_one_sentence(tmp_path: Path, net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"^Sharpness differentiates .*{message}") as raised:
        fit(tmp_path, Net(net), Sharpness(1))
    assert "\n" not in str(raised.value)


def test_a_loss_without_gradients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one that does not depend on parameters; compute it with gradients enabled"):
        fit(tmp_path, Net(small()), Sharpness(1, loss=lambda module, batch: torch.zeros(())))


@pytest.mark.parametrize("returned", [1.0, torch.zeros(2)], ids=["number", "vector"])
def test_a_loss_is_a_tensor_of_one_value(tmp_path: Path, returned: Any) -> None:
    with pytest.raises(TypeError, match="Sharpness needs a loss that is a tensor of one value, not "):
        fit(tmp_path, Net(small()), Sharpness(1, loss=lambda module, batch: returned))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"products": 0}, "products must be a whole number of at least 1, not 0"),
        ({"products": 2.5}, "products must be a whole number of at least 1, not 2.5"),
        ({"average": 0}, "average must be a whole number of at least 1, not 0"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sharpness(**options)


def test_runs_that_it_cannot_measure_are_refused_at_setup(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^Sharpness evaluates training_step, .*; pass loss=, a function of"):
        fit(tmp_path, TwoOptimizers(), Sharpness(1), batches=loader())
    losses = [lambda module, batch: module.net(batch[0]).square().mean()] * 3
    with pytest.raises(ValueError, match="one for each; 3 were given, and the number of optimizers is 1"):
        fit(tmp_path, SmallNet(), Sharpness(1, loss=losses), batches=loader())


def test_each_of_several_optimizers_has_its_own_hessian(tmp_path: Path) -> None:
    loss = lambda module, batch: module.net(batch[0]).square().mean()  # noqa: E731
    record = fit(tmp_path, TwoOptimizers(), Sharpness(1, loss=loss), batches=loader(), max_steps=4)
    assert record["optimizer"].tolist() == [0, 1, 0, 1]
    assert record["sharpness"][0] != record["sharpness"][1]
    assert record["bound"].tolist() == [200.0] * 4


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_loss_that_is_not_finite_leaves_nulls_and_no_trace_in_the_means(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            # The last has no second derivative
            return [None, loss, loss, math.nan * self.net[1].weight.sum()][batch_idx]

    record = fit(tmp_path, Broken(small()), Sharpness(1), max_steps=4)
    values, means = record["sharpness"].tolist(), record["sharpness_mean"].tolist()
    assert [math.isnan(v) for v in values] == [True, False, False, True]
    middle = (values[1] + values[2]) / 2
    assert math.isnan(means[0])
    assert means[1:] == pytest.approx([values[1], middle, middle])
    assert record["preconditioned"].isna().tolist() == [True, False, False, True]


# Ranks


class OnRanks(Net):
    """Takes every second sample of a batch of the union on each of two ranks."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        rank, ranks = self.global_rank, self.trainer.world_size
        return super().training_step((batch[0][rank::ranks], batch[1][rank::ranks]), batch_idx)


def measured_on_ranks(folder: str, ranks: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2))
    options = {"devices": int(ranks), "strategy": "ddp" if int(ranks) > 1 else "auto", "use_distributed_sampler": False}
    for optimizer in ("sgd", "adam"):
        module = OnRanks(net, optimizer)
        fit_options = {"max_steps": 2, "callbacks": [Sharpness(1, products=12)], **options}
        trainer(f"{folder}/{optimizer}", **fit_options).fit(module, data())


def refused_on_ranks(folder: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), normzoo.create_norm("batch", 3, sync=True), nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match="^Sharpness differentiates .* net.1 takes statistics over all ranks, of which"
    ):
        trainer(folder, max_steps=1, callbacks=[Sharpness(1)], devices=2, strategy="ddp").fit(OnRanks(net), data())


@pytest.mark.slow
def test_statistics_of_all_ranks_are_refused(tmp_path: Path) -> None:
    run_function(tmp_path / "run", refused_on_ranks, 2, str(tmp_path))


def test_ranks_equal_one_rank_on_the_union_of_their_batches(tmp_path: Path) -> None:
    measured_on_ranks(str(tmp_path / "of1"), "1")
    run_function(tmp_path / "run", measured_on_ranks, 2, str(tmp_path / "of2"), "2")
    for optimizer in ("sgd", "adam"):
        one, two = (load_run(tmp_path / f"of{ranks}" / optimizer / "log")["sharpness"] for ranks in (1, 2))
        for column in ("sharpness", "smallest", "preconditioned", "bound", "sharpness_mean"):
            assert two[column].tolist() == pytest.approx(one[column].tolist(), rel=1e-7, nan_ok=True), column
        assert one["step"].tolist() == two["step"].tolist() == [0, 1]
