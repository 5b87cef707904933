"""Measurements of a user's own: what one may say of itself, and what is refused when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks_small import SmallNet, TwoOptimizers, loader, trainer
from ranks import run_function
from torch import Tensor, nn

from normzoo import load_run, watch
from normzoo.callbacks import Column, Measurement, Run, Sample, Step


class One(Measurement):
    """One number."""

    name = "one"
    columns = (Column("x", "float", "a number", logged=True),)

    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        return {"x": torch.tensor(1.0)}

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        return [{"x": values["x"].item()}]


class Outputs(Measurement):
    """The mean of the output of each layer, over the micro-batches of a step."""

    name = "outputs"
    columns = (
        Column("layer", "text", "name of the module"),
        Column("mean", "float", "mean of its output"),
        Column("passes", "int", "micro-batches"),
    )
    needs = frozenset({"activations"})

    def sites(self, run: Run) -> dict[tuple[str, str], nn.Module]:
        return {(name, "output"): module for name, module in run.module.named_modules() if name.startswith("net.")}

    def activation(self, step: Step, site: tuple[str, str], module: nn.Module, x: Tensor) -> Tensor:
        return x.mean()

    def measure(self, step: Step) -> dict[str, Tensor]:
        return {name: torch.stack(means) for (name, _), means in step.seen.items()}

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        return [{"layer": n, "mean": v.mean().item(), "passes": len(v)} for n, v in values.items()]


class OutputsOfBatches(Outputs):
    """The same at the end of the batch, when the steps have been made."""

    unit = "batch"


def fit(folder: Path, measurement: Measurement, net: SmallNet | None = None, **options: Any) -> Any:
    options = {"max_steps": 5, **options}
    trainer(str(folder), callbacks=[measurement], **options).fit(net or SmallNet(), loader())
    return load_run(folder / "log")[measurement.name]


# Activations before the step


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_sees_the_activations_of_all_its_micro_batches(tmp_path: Path, accumulate: int) -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(SmallNet())
    frames = []
    for kind, net in zip((Outputs, OutputsOfBatches), nets, strict=True):
        torch.manual_seed(1)
        frames.append(fit(tmp_path / kind.__name__, kind(2), net, accumulate_grad_batches=accumulate))
    assert len(frames[0]) == 3 * 7
    assert set(frames[0]["passes"]) == {accumulate}
    assert frames[0].equals(frames[1])


def test_each_optimizer_of_a_batch_sees_its_activations(tmp_path: Path) -> None:
    frame = fit(tmp_path, Outputs(1), TwoOptimizers(), max_steps=6)
    assert frame.groupby("step")["layer"].nunique().tolist() == [7] * 6
    assert set(frame["passes"]) == {1}


class Model(nn.Module):
    """The network of a SmallNet, called as a plain loop calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet().net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def looped(folder: Path, measurement: Measurement, tell: bool = False, accumulate: int = 1) -> Any:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, measurement, dirpath=folder) as watching:
        for x, y in list(loader())[:5]:
            optimizer.zero_grad()
            for _ in range(accumulate):
                nn.functional.cross_entropy(model(x), y).backward()
            if tell:
                watching.batch((x, y))
            optimizer.step()
    return load_run(folder)[measurement.name]


def test_a_step_of_a_plain_loop_sees_the_activations_of_all_its_calls(tmp_path: Path) -> None:
    frame = looped(tmp_path, Outputs(2), accumulate=2)
    assert frame.groupby("step")["layer"].nunique().to_dict() == {0: 7, 2: 7, 4: 7}
    assert set(frame["passes"]) == {2}


# Values on their way to the host


class Listens(One):
    """Notes what others have measured."""

    name = "listens"

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.heard: list[tuple[str, int, Any]] = []

    def told(self, run: Run, measurement: Measurement, sample: Sample, rows: Any) -> None:
        self.heard.append((measurement.name, sample.step, rows))


@pytest.mark.parametrize("first", [True, False])
def test_a_measurement_is_told_the_rows_of_the_others(tmp_path: Path, first: bool) -> None:
    expected = [("one", step, [{"step": step, "x": 1.0}]) for step in (0, 2, 4)]
    listens = Listens(1)
    both = [listens, One(2)] if first else [One(2), listens]
    trainer(str(tmp_path), callbacks=both, max_steps=5).fit(SmallNet(), loader())
    assert listens.heard == expected
    listens, model = Listens(1), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    both = [listens, One(2)] if first else [One(2), listens]
    with watch(model, optimizer, *both, dirpath=tmp_path / "loop"):
        for _ in range(5):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert listens.heard == expected


class Kinds(Measurement):
    """Values of several dtypes."""

    name = "kinds"
    columns = (Column("whole", "int", ""), Column("real", "float", ""), Column("truth", "int", ""))

    def measure(self, step: Step) -> dict[str, Tensor]:
        return {"whole": torch.tensor(2**24 + 1), "real": torch.tensor(0.1), "truth": torch.tensor(True)}

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        assert [v.dtype for v in values.values()] == [torch.int64, torch.float32, torch.int64]
        return [{name: value.item() for name, value in values.items()}]


def test_values_of_several_dtypes_arrive_as_they_were(tmp_path: Path) -> None:
    frame = fit(tmp_path, Kinds(2))
    row = {"whole": 2**24 + 1, "real": torch.tensor(0.1).item(), "truth": 1}
    assert frame.drop(columns="step").to_dict("records") == [row] * 3


def kinds_on_ranks(folder: str) -> None:
    trainer(folder, callbacks=[Kinds(2)], max_steps=3, devices=2, strategy="ddp").fit(SmallNet(), loader())


def test_values_of_several_dtypes_are_added_over_ranks(tmp_path: Path) -> None:
    run_function(tmp_path, kinds_on_ranks, 2, str(tmp_path))
    frame = load_run(tmp_path / "log")["kinds"]
    row = {"whole": 2**25 + 2, "real": 2 * torch.tensor(0.1).item(), "truth": 2}
    assert frame.drop(columns="step").to_dict("records") == [row] * 2


# Passes of its own


class Again(One):
    """The loss of the mini-batch, computed once more."""

    needs = frozenset({"extra_pass"})

    def measure(self, step: Step) -> dict[str, Tensor]:
        x, y = step.batch
        with step.extra_passes() as one_pass, one_pass(), torch.no_grad():
            return {"x": nn.functional.cross_entropy(step.run.module.net(x), y)}


def test_an_extra_pass_brings_the_batch(tmp_path: Path) -> None:
    assert Again.needs == {"extra_pass"}
    assert fit(tmp_path / "trainer", Again(2))["x"].gt(0).tolist() == [True] * 3
    assert looped(tmp_path / "loop", Again(2), tell=True)["x"].gt(0).tolist() == [True] * 3
    with pytest.raises(ValueError, match=r"Again needs the mini-batch .*; call watching\.batch\(batch\) before"):
        looped(tmp_path / "silent", Again(2))


# What is refused


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        ({"reduce": "mean"}, ValueError, "'mean' is not a known way to reduce over ranks; did you mean 'min'"),
        ({"needs": "loss"}, TypeError, "needs of Own must be a set of names, such as {'loss'}, not 'loss'"),
        ({"needs": {"grads"}}, ValueError, "'grads' is not a known need of a measurement"),
        ({"unit": "epoch"}, ValueError, "'epoch' is not a known unit of a measurement"),
        ({"unit": "batch", "needs": {"loss", "update"}}, ValueError, "Own needs what an optimizer's step changes, and"),
        ({"key": "{stat}/{laye}"}, ValueError, r"key of Own must be made of {stat} and columns \(step, x\) in braces"),
        ({"name": "Own"}, ValueError, "the name of a record must be of lower-case letters"),
        ({"name": ""}, TypeError, "Own must have a name"),
        ({"columns": (Column("h", "histogram", ""),)}, ValueError, "histogram 'h', and no column 'mantissa_bits'"),
    ],
)
def test_what_a_measurement_says_is_checked(attributes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        type("Own", (One,), attributes)()


@pytest.mark.parametrize("kind", ["text", "curve", "histogram"])
def test_only_numbers_are_logged(kind: str) -> None:
    with pytest.raises(ValueError, match=f"column 'x' cannot be logged, as loggers take numbers .* it is '{kind}'"):
        Column("x", kind, "", logged=True)


@pytest.mark.parametrize("value", [1.5, torch.tensor(1.0), "high", 2**70, [1.0]])
def test_a_value_of_another_type_is_named_by_its_column(tmp_path: Path, value: Any) -> None:
    class Other(One):
        columns = (Column("x", "int", ""),)

        def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
            return [{"x": value}]

    with pytest.raises(ValueError, match=r"one-000\.arrows: column 'x' is of the type int64[:,] "):
        fit(tmp_path, Other(2))


def test_a_subclass_with_a_layer_has_it_in_its_log_keys(tmp_path: Path) -> None:
    class OfLayers(One):
        name = "of_layers"
        columns = (Column("layer", "text", ""), *One.columns)

        def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
            return [{"layer": name, "x": 1.0} for name in ("a", "b")]

    fit(tmp_path, OfLayers(2))
    assert {"of_layers/x/a", "of_layers/x/b"} <= {
        *(tmp_path / "log" / "metrics.csv").read_text().split("\n")[0].split(",")
    }


# What one of a user's own says wrongly


class Shares(Outputs):
    """Counts zeros, as the page of measurements shows: of a module that is not called there are none."""

    name = "shares"
    columns = (Column("layer", "text", "name of the module"), Column("count", "int", "values"))
    unit = "batch"

    def sites(self, run: Run) -> dict[tuple[str, str], nn.Module]:
        return {**super().sites(run), ("rare", "output"): run.module.rare}

    def activation(self, step: Step, site: tuple[str, str], module: nn.Module, x: Tensor) -> Tensor:
        return torch.tensor(x.numel())

    def measure(self, step: Step) -> dict[str, Tensor]:
        nothing = torch.zeros((), dtype=torch.int64)
        return {name: torch.stack([nothing, *calls]).sum(0) for (name, _), calls in step.seen.items()}

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        return [{"layer": name, "count": count.item()} for name, count in values.items()]


class Rarely(SmallNet):
    """A network one of whose modules is called by one rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Identity()
        self.rare = nn.Identity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1:
            self.rare(batch[0])
        return super().training_step(batch, batch_idx)


def of_a_rank_that_does_not_call(folder: str) -> None:
    trainer(folder, callbacks=[Shares(1)], max_steps=2, strategy="ddp", devices=2).fit(Rarely(), loader())
    torch.distributed.destroy_process_group()


def test_a_module_that_one_rank_does_not_call_is_told_of_with_nothing(tmp_path: Path) -> None:
    run_function(tmp_path, of_a_rank_that_does_not_call, 2, str(tmp_path))
    frame = load_run(tmp_path / "log")["shares"]
    assert (frame.groupby("layer")["step"].nunique() == 2).all()
    first = frame[frame["step"] == 0].set_index("layer")["count"]
    images = next(iter(loader()))[0]
    assert first["rare"] == images.numel()  # of rank 1
    assert first["net.3"] % 2 == 0


class Late(SmallNet):
    """Makes its layers after setup."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.net
        del self.net

    def configure_model(self) -> None:
        self.net = self.kept


def test_a_check_sees_the_layers_that_are_made_after_setup(tmp_path: Path) -> None:
    class Asks(One):
        seen: list[tuple[bool, int]] = []  # noqa: RUF012

        def check(self, run: Run) -> None:
            self.seen.append((run.complete, len(run.named_modules())))
            if run.complete:
                raise ValueError("Asks finds the layers")

    with pytest.raises(ValueError, match="Asks finds the layers"):
        fit(tmp_path, Asks(1), Late())
    (before, _), (after, modules) = Asks.seen
    assert (before, after) == (False, True)
    assert modules > 3


def test_names_of_modules_have_no_prefixes_of_the_compiler() -> None:
    class Facts(Run):
        module = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))

    Facts.module[0] = torch.compile(Facts.module[0], backend="eager")
    assert list(Facts().named_modules()) == ["0", "0.0"]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"sites": lambda self, run: {}}, "Two defines sites, and 'activations' is not among its needs; add it there"),
        ({"activation": lambda self, *_: None}, "Two defines activation, and 'activations' is not among its needs"),
        ({"measure_applied": lambda self, step: None}, "Two defines measure_applied, and 'applied' is not among"),
        (
            {"needs": {"activations"}, "sites": lambda self, run: {}},
            "Two needs 'activations', and does not define activation; define it",
        ),
        ({"needs": {"activations"}}, "Two needs 'activations', and does not define sites; define it"),
        ({"needs": {"applied", "gradients"}}, "Two needs 'applied', and does not define measure_applied; define it"),
    ],
)
def test_methods_without_their_need_are_refused(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        type("Two", (One,), attributes)()


@pytest.mark.parametrize("site", ["net.0", ("net.0", "in"), ("net.0",), 3])
def test_a_site_that_is_named_otherwise_is_refused(tmp_path: Path, site: Any) -> None:
    class Elsewhere(Outputs):
        def sites(self, run: Run) -> Any:
            return {site: run.module.net[0]}

    with pytest.raises(
        ValueError, match=r"sites of Elsewhere must be named by \(name of the module, 'input' or 'output'"
    ):
        fit(tmp_path, Elsewhere(1))


@pytest.mark.parametrize("values", [[torch.ones(())], {"x": 1.0}, 3.0], ids=["list", "float", "number"])
def test_what_is_measured_has_to_be_tensors_by_name(tmp_path: Path, values: Any) -> None:
    class Wrong(One):
        def measure(self, step: Step) -> Any:
            return values

    with pytest.raises(TypeError, match="Wrong must measure tensors by name, such as {'norm': tensor}, or None for no"):
        fit(tmp_path, Wrong(1))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "a row of Wrong has no 'x'; its columns are x, with None for what is undefined"),
        ({"x": 1.0, "y": 2.0}, "a row of Wrong has undeclared 'y'; its columns are x"),
        ({"z": 1.0}, "a row of Wrong has no 'x' and has undeclared 'z'; its columns are x"),
    ],
)
def test_a_row_with_other_columns_is_refused(tmp_path: Path, row: dict[str, float], message: str) -> None:
    class Wrong(One):
        def rows(self, sample: Sample, values: Any) -> list[dict[str, Any]]:
            return [row]

    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Wrong(1))
