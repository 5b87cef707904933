"""What a measurement says of itself is checked where it is said; one of a user's own works wherever ours do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks_small import SmallNet, TwoOptimizers, loader, trainer
from torch import Tensor, nn
from watch_small import sgd, small_net, train

from normzoo import load_run, watch
from normzoo.callbacks import Column, Figure, Measurement, Run, Sample, Step
from normzoo.report.drawing import draw_figure


class WeightNorm(Measurement):
    """The L2 norm of each parameter."""

    name = "weight_norm"
    row = "one sampled step and parameter"
    columns = (Column("layer", "text", "name"), Column("norm", "float", "its L2 norm", logged=True))
    figures = (Figure("Norms of weights", "line", x="step", y="norm", lines=("layer",)),)
    reduce = None

    def measure(self, step: Step) -> dict[str, Tensor]:
        return {name: p.detach().norm() for name, p in step.parameters.items()}

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        return [{"layer": name, "norm": norm.item()} for name, norm in values.items()]


class Everything(Measurement):
    """Keeps one number of each thing that can be needed."""

    name = "everything"
    columns = (
        Column("loss", "float", "of the last micro-batch"),
        Column("again", "float", "the same by an extra pass"),
        Column("gradient", "float", "sum of the gradients"),
        Column("backward", "float", "sum of those of each backward pass"),
        Column("update", "float", "sum of the updates"),
        Column("heard", "float", "sum of the means of the activations"),
    )
    needs = frozenset({"loss", "batch", "gradients", "backward", "update", "activations", "extra_pass"})

    def sites(self, run: Run) -> dict[tuple[str, str], nn.Module]:
        return {("net.0", "output"): run.module.net[0], ("net.1", "input"): run.module.net[1]}

    def activation(self, step: Step, site: tuple[str, str], module: nn.Module, x: Any) -> Tensor:
        return x.mean()  # type: ignore[no-any-return]

    def gradient(self, step: Step, name: Any, g: Tensor) -> None:
        step.memory["backward"] = step.memory.get("backward", 0.0) + g.sum()

    def measure(self, step: Step) -> None:
        with step.extra_passes() as one_pass, one_pass(), torch.no_grad():
            step.memory["again"] = step.training_loss().detach()
        step.memory["gradient"] = sum(g.sum() for g in step.gradients().values())
        step.memory["loss"] = step.loss

    def measure_update(self, step: Step) -> dict[str, Tensor]:
        names = ("loss", "again", "gradient", "backward")
        return {name: step.memory[name] for name in names} | {
            "update": sum((u.sum() for u in step.update().values()), torch.zeros(())),
            "heard": torch.stack([v for values in step.seen.values() for v in values]).sum(),
        }

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        return [{name: value.item() for name, value in values.items()}]


def test_a_measurement_of_ones_own_in_a_trainer_and_in_a_plain_loop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SmallNet()
    start = {name: p.detach().norm().item() for name, p in module.net.named_parameters()}
    state = {k: v.clone() for k, v in module.net.state_dict().items()}
    run = trainer(str(tmp_path), max_steps=6, callbacks=[WeightNorm(2)])
    run.fit(module, loader())
    frame = load_run(run.log_dir)["weight_norm"]
    assert frame["step"].tolist() == [s for s in (0, 2, 4) for _ in start]
    first = frame[frame["step"] == 0]
    assert dict(zip(first["layer"], first["norm"], strict=True)) == {f"net.{k}": v for k, v in start.items()}
    assert frame.attrs["figures"] == list(WeightNorm.figures)
    figure = draw_figure(frame.attrs["figures"][0], {"run": frame})
    assert figure is not None
    assert {line.label for line in figure.panels[0].series} == {f"run, net.{k}" for k in start}
    logged = Path(run.log_dir, "metrics.csv").read_text().splitlines()[0]
    assert "weight_norm/norm/net.0.weight" in logged

    net = small_net()
    net.load_state_dict(state)
    with watch(net, sgd(net), WeightNorm(2), dirpath=tmp_path / "loop") as watching:
        train(net, watching._run.optimizers[0], watching, steps=6)
    loop = load_run(tmp_path / "loop")["weight_norm"]
    assert loop[loop["step"] == 0]["norm"].tolist() == list(start.values())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_all_that_a_step_tells(tmp_path: Path, accumulate: int) -> None:
    torch.manual_seed(0)
    module = SmallNet(optimizer="adamw")
    module.net[3] = nn.Identity()  # no dropout: the extra pass is that of training
    before: list[float] = []
    run = trainer(str(tmp_path), max_steps=3, accumulate_grad_batches=accumulate, callbacks=[Everything(1)])
    before.append(sum(p.sum().item() for p in module.parameters()))
    run.fit(module, loader())
    frame = load_run(run.log_dir)["everything"]
    assert len(frame) == 3
    assert frame["again"].tolist() == pytest.approx(frame["loss"].tolist(), rel=1e-6)
    # Lightning divides the loss of each backward pass, and .grad is the sum
    assert frame["backward"].tolist() == pytest.approx(frame["gradient"].tolist(), rel=1e-4, abs=1e-5)
    after = sum(p.sum().item() for p in module.parameters())
    assert after - before[0] == pytest.approx(frame["update"].sum(), rel=1e-4, abs=1e-4)


class Needs(WeightNorm):
    def __init__(self, *needs: str) -> None:
        self.needs = set(needs)
        super().__init__(1)


@pytest.mark.parametrize("need", ["backward"])
def test_what_a_plain_loop_does_not_tell_is_refused(need: str) -> None:
    model = small_net()
    with pytest.raises(
        ValueError, match=r"^Needs needs the gradients of single backward passes; a plain loop does not"
    ):
        watch(model, sgd(model), Needs(need))


def test_a_need_that_there_is_not_is_named_when_one_is_made() -> None:
    with pytest.raises(ValueError, match=r"'gradient' is not a known need of a measurement; did you mean 'gradients'"):
        Needs("gradient")


def define(**attributes: Any) -> type[Measurement]:
    return type("Own", (WeightNorm,), attributes)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "Weight-Norm"}, "the name of a record must be of lower-case letters"),
        ({"columns": (Column("a", "int", ""), Column("a", "int", ""))}, "several columns of the name a"),
        (
            {"figures": (Figure("F", "line", x="step", y="nrm"),)},
            "figure 'F' of the record 'weight_norm' is drawn from nrm",
        ),
    ],
)
def test_what_a_measurement_says_of_itself_is_checked_at_its_definition(attributes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        define(**attributes)


def test_columns_and_figures_of_kinds_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="column 'a' must be one of int, int32, float"):
        Column("a", "double", "")
    kinds = "line, profile, curve, histogram, signed histogram, heat map"
    with pytest.raises(ValueError, match=f"kind of figure 'F' must be one of {kinds}, not 'bar'"):
        Figure("F", "bar", x="step", y="norm")


def test_a_measurement_without_a_name_or_rows_cannot_be_made() -> None:
    with pytest.raises(TypeError, match=r"Measurement must have a name, and define rows\(sample, values\)"):
        Measurement()
    with pytest.raises(ValueError, match="'steps' is not a known unit of a measurement; did you mean 'step'"):
        define(unit="steps")()


def test_each_optimizer_has_samples_of_its_own_steps(tmp_path: Path) -> None:
    run = trainer(str(tmp_path), max_steps=8, callbacks=[WeightNorm(2)])
    run.fit(TwoOptimizers(), loader())
    frame = load_run(run.log_dir)["weight_norm"]
    # Optimizers take turns: of each the steps 0 and 2 of its own are sampled
    assert sorted(set(frame["step"])) == [0, 1, 4, 5]
    assert {layer.split(".")[1] for layer in frame[frame["step"] == 1]["layer"]} == {"6"}
