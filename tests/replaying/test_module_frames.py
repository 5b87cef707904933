"""The first bad module of planted faults: by values that are not finite, by jumps, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fake_stage import FakeStage, Task
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normzoo.causes import titles
from normzoo.functional.finite_moments import finite_moments
from normzoo.replaying.first_bad import Merged, earliest, first_bad_gradient, first_bad_output, first_jump, merge_calls
from normzoo.replaying.module_frames import MODULES, MOST_CALLS, ask
from normzoo.report.drawing import draw_figure

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
NAN, INF = torch.nan, torch.inf


def asked(
    net: nn.Module,
    plant: Callable[[Any], Any] = lambda net: None,
    bad: Any = None,
    quiet: Any = X,
    loss: Callable[[Any, Any], Tensor] | None = None,
    precision: str = "32-true",
    kind: str = "divergence",
) -> tuple[dict[str, Any], pd.DataFrame, FakeStage]:
    """The evidence of a fault planted before step 1 of 2, and the record."""
    stage = FakeStage(Task(net, loss), [[quiet], [quiet + 0.01 if bad is None else bad]])
    stage.capsule.about["kind"] = kind
    stage.plant(1, lambda task: plant(task.net))
    evidence: dict[str, Any] = {"course": {"onset": 1}, "about": {"precision": precision}}
    records = ask(stage, evidence)
    (rows,) = [rows for schema, rows in records if schema.name == MODULES.name] or [[]]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stage.module.modules())
    return evidence, pd.DataFrame(rows), stage


def conv() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 4))


def test_a_healthy_step_has_no_bad_module_and_a_record_of_all_calls() -> None:
    evidence, frame, _ = asked(conv())
    assert evidence["first_bad"] is None
    assert evidence["norm_layers"] == []
    assert {*frame.columns} == {column.name for column in MODULES.columns}
    assert len(frame) == 2 * 6 * 3
    assert frame["module"].drop_duplicates().tolist() == ["net.0", "net.1", "net.2", "net.3", "net.4", "net"]
    row = frame[(frame.frame == "quiet") & (frame.module == "net.0") & (frame.side == "input")].iloc[0]
    assert (row.step, row.call, row["class"], row.depth, row.nonfinite) == (0, 0, "Conv2d", 0, 0)
    assert (row["min"], row["max"]) == (X.min().item(), X.max().item())
    assert (row["mean"], row["std"]) == pytest.approx((X.mean().item(), X.std(unbiased=False).item()), rel=1e-5)
    assert MODULES.figures[0].title == titles.MODULES
    for figure in MODULES.figures:
        assert draw_figure(figure, {"": frame}) is not None


@pytest.mark.parametrize(("bad", "figures"), [(X, 1), (X * INF, 2)])
def test_a_figure_of_values_that_are_not_finite_is_there_if_there_are_any(bad: Tensor, figures: int) -> None:
    ((schema, _),) = ask(FakeStage(Task(conv()), [[bad]]), {})
    assert len(schema.figures) == figures


class Half(nn.Module):
    """Computes in float16 between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x).half() * 200).float() / 200)


class Masked(nn.Module):
    """An attention whose mask may leave nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.softmax = nn.Linear(16, 16), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.query(x) @ x.mT).masked_fill(x[..., :1] >= 9, -INF)
        return self.softmax(scores) @ x


class Root(nn.Module):
    """The derivative of a square root at 0, which is selected away in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.after = nn.Linear(1, 1, bias=False), nn.Identity()
        nn.init.ones_(self.scale.weight)

    def forward(self, x: Tensor) -> Tensor:
        z = self.scale(x[..., :1])
        return self.after(torch.where(z > 0, z.sqrt(), z * 0))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(16, 16), nn.Linear(16, 2), reentrant
        self.block = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU(inplace=True), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.reentrant))


def spoilt(x: Tensor, value: float, *at: int) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


def deep() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(9)))


def spoil_statistics(net: Any) -> None:
    net[1].running_var[2] = INF
    net[1].running_mean[2] = INF


NONFINITE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a weight": (
        {"net": conv(), "plant": lambda net: net[4].weight[0].fill_(NAN)},
        {"module": "net.4", "class": "Linear", "depth": 4, "op": None, "weight_nonfinite": ["net.4.weight"]},
    ),
    "running statistics": (
        {"net": conv().eval(), "plant": spoil_statistics},
        {"module": "net.1", "op": None, "weight_nonfinite": ["net.1.running_mean", "net.1.running_var"]},
    ),
    "the batch": (
        {"net": conv(), "bad": spoilt(X, NAN, 1, 0, 2, 3)},
        {"module": "net.0", "op": None, "input_nonfinite": True, "weight_nonfinite": []},
    ),
    "an LSTM's weight": (
        {
            "net": nn.LSTM(16, 8),
            "plant": lambda net: net.weight_hh_l0.fill_(INF),
            "quiet": WORDS,
            "loss": lambda output, _: output[0].square().mean(),
        },
        {"module": "net", "class": "LSTM", "weight_nonfinite": ["net.weight_hh_l0"]},
    ),
    "float32": (
        {"net": deep(), "plant": lambda net: [m.weight.mul_(1e6) for m in net], "quiet": WORDS},
        {"module": "net.6", "class": "Linear", "op": "aten.addmm", "limit": torch.finfo(torch.float32).max},
    ),
    "half precision": (
        {"net": Half(), "plant": lambda net: net.first.weight.mul_(1e3), "quiet": WORDS},
        {
            "module": "net",
            "class": "Half",
            "op": "aten.mul",
            "dtype": "float16",
            "limit": 65504,
            "float32_finite": True,
        },
    ),
    "half precision, where float32 is no better": (
        {"net": Half(), "plant": lambda net: net.first.weight.mul_(1e38), "quiet": WORDS},
        {"module": "net", "op": "aten._to_copy", "dtype": "float16", "float32_finite": False},
    ),
    "a mask that leaves nothing": (
        {"net": Masked(), "bad": spoilt(WORDS, 10.0, 1, 2, 0), "quiet": WORDS},
        {"module": "net.softmax", "class": "Softmax", "op": "aten._softmax", "input_max": INF},
    ),
    "the loss": (
        {"net": nn.Linear(16, 2), "plant": lambda net: net.weight.mul_(1e20), "quiet": WORDS},
        {"module": "training_step", "class": "Task", "depth": None, "op": "aten.pow", "weight_nonfinite": []},
    ),
    "a derivative": (
        {"net": Root(), "bad": spoilt(WORDS.abs() + 1, 0.0, 0, 0, 0), "quiet": WORDS.abs() + 1},
        {"direction": "backward", "module": "net", "class": "Root", "op": "aten.div"},
    ),
    **{
        f"a checkpoint, reentrant {reentrant}": (
            {"net": Checkpointed(reentrant), "plant": lambda net: net.block[3].weight.fill_(3e38), "quiet": WORDS},
            {"module": "net.block.3", "op": "aten.addmm", "depth": 4},
        )
        for reentrant in (True, False)
    },
}


@pytest.mark.parametrize("fault", NONFINITE)
def test_values_that_are_not_finite_come_from_the_module_they_were_planted_in(fault: str) -> None:
    torch.manual_seed(0)
    options, expected = NONFINITE[fault]
    evidence, frame, _ = asked(**options)
    found = evidence["first_bad"]
    told = {"step": 1, "direction": "forward", "kind": "nonfinite", "input_nonfinite": False, "float32_finite": None}
    assert {key: found[key] for key in (told | expected)} == told | expected
    assert found["op"] is None or found["input_max"] is not None
    if expected["module"] != "training_step" and found["direction"] == "forward":
        rows = frame[(frame.frame == "bad") & (frame.module == found["module"]) & (frame.side == "output")]
        assert (rows.nonfinite > 0).all()


JUMPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a weight": (
        {"net": conv(), "plant": lambda net: net[4].weight.mul_(1e3)},
        {"direction": "forward", "module": "net.4", "times": 1e3},
    ),
    "the batch, which is no module's": ({"net": conv(), "bad": 1e4 * X, "plant": lambda net: None}, None),
    "a group that died": (
        {
            "net": nn.Sequential(nn.Conv1d(6, 8, 3), nn.GroupNorm(4, 8), nn.Conv1d(8, 2, 3)),
            "plant": lambda net: (net[0].weight[:2].zero_(), net[0].bias[:2].zero_()),
            "quiet": WORDS,
        },
        {"direction": "backward", "module": "net.1", "class": "GroupNorm"},
    ),
}


@pytest.mark.parametrize("fault", JUMPS)
def test_a_jump_is_at_the_module_it_was_planted_in(fault: str) -> None:
    options, expected = JUMPS[fault]
    found = asked(**options)[0]["first_bad"]
    if expected is None:
        assert found is None
        return
    assert found["kind"] == "jump"
    assert {key: found[key] for key in expected} == expected | {"times": pytest.approx(1e3, rel=0.1)} or (
        "times" not in expected and found["times"] > 10
    )
    assert found["input_times"] < 10


def test_beside_an_overflow_the_jump_before_it_is_told() -> None:
    found = asked(nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 2)), lambda net: net[0].weight.mul_(1e25), quiet=WORDS)
    assert (found[0]["first_bad"]["module"], found[0]["first_bad"]["kind"]) == ("training_step", "nonfinite")
    assert found[0]["first_bad"]["jump"]["module"] == "net.0"


def test_a_dead_channel_is_told_with_its_share_of_the_gradient() -> None:
    evidence, _, _ = asked(conv(), lambda net: (net[0].weight[3].zero_(), net[1].bias[3].fill_(1.0)))
    (row,) = evidence["norm_layers"]
    assert (row["module"], row["channels"], row["dead"], row["dead_quiet"], row["channel"]) == ("net.1", 8, 1, 0, 3)
    assert row["variance"] == 0
    assert row["variance_quiet"] > 0.01
    assert row["gradient"] > 0.9


def test_an_error_is_told_with_the_module_that_raises_it() -> None:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Embedding(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    tokens = torch.arange(4)
    evidence, frame, _ = asked(Raises(), bad=tokens + 3, quiet=tokens, kind="exception")
    assert evidence["first_bad"] == {
        "step": 1,
        "module": "net.inner.0",
        "error": "IndexError: index out of range in self",
    }
    assert frame.empty
    with pytest.raises(IndexError, match="out of range"):
        asked(Raises(), bad=tokens + 3, quiet=tokens)


def test_of_a_module_that_is_called_often_the_first_calls_are_recorded_and_all_are_looked_at() -> None:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(12):
                x = F.relu(self.cell(x))
            return x

    def plant(net: Unrolled) -> None:
        net.cell.weight.copy_(torch.eye(16) * 5e3)

    evidence, frame, stage = asked(Unrolled(), plant, quiet=WORDS.abs())
    assert (evidence["first_bad"]["module"], evidence["first_bad"]["op"]) == ("net.cell", "aten.addmm")
    assert frame[frame.module == "net.cell"]["call"].max() == MOST_CALLS - 1
    assert [note for note in stage.notes if "8 calls" in note]


def test_micro_batches_are_taken_together_and_without_a_quiet_step_there_is_no_jump() -> None:
    stage = FakeStage(Task(nn.Linear(3, 2)), [[torch.ones(2, 3), torch.tensor([[INF, 5.0, -5.0]])]])
    evidence: dict[str, Any] = {"course": {"onset": 0}}
    ((_, rows),) = ask(stage, evidence)
    (row,) = [row for row in rows if row["side"] == "input"]
    assert (row["min"], row["max"], row["nonfinite"], row["frame"]) == (-5.0, 5.0, 1, "bad")
    assert evidence["first_bad"]["input_nonfinite"]
    stage.batches[0].pop()
    stage.plant(0, lambda task: task.net.weight.mul_(1e9))
    ask(stage, evidence)
    assert evidence["first_bad"] is None


def test_without_origins_calls_are_compared() -> None:
    def call(name: str, depth: int, **values: float) -> Merged:
        sides = {side.replace("_", " "): finite_moments(torch.tensor([v])).tolist() for side, v in values.items()}
        return Merged(name, 0, "Module", depth, True, sides)

    calls = [call("a", 0, input=1, output=2), call("b", 1, input=2, output=INF), call("c", 2, input=INF, output=NAN)]
    assert first_bad_output(calls) is calls[1]
    assert first_bad_output(calls[2:]) is calls[2]
    assert first_bad_output(calls[:1]) is None
    calls = [call("a", 0, gradient=NAN, input_gradient=NAN), call("b", 1, gradient=1, input_gradient=NAN)]
    assert first_bad_gradient(calls) is calls[1]
    assert first_bad_gradient(calls[:1]) is calls[0]
    quiet = [call("zero", 0, input=1, output=0), call("a", 1, input=1, output=1), call("b", 2, input=1, output=1)]
    bad = [call("zero", 0, input=1, output=1e-3), call("a", 1, input=1, output=9), call("b", 2, input=9, output=80)]
    found = first_jump(bad, quiet)
    assert found is not None
    assert (found[1].name, found[2], found[3]) == ("b", pytest.approx(80), pytest.approx(9))
    bad.append(call("c", 3, input=9, output=900))  # which alone is ten times its input's growth
    found = first_jump(bad, [*quiet, call("c", 3, input=1, output=1)])
    assert found is not None
    assert found[1].name == "c"
    whole = Merged("whole", 0, "Module", 4, False, bad[3].moments | {"input": bad[0].moments["input"]})
    found = first_jump([*bad[:3], whole], [*quiet, replace(whole, moments=quiet[1].moments)])
    assert found is not None
    assert found[1].name == "b"  # and not the module that holds all
    found = first_jump([bad[0], whole], [quiet[0], replace(whole, moments=quiet[1].moments)])
    assert found is not None
    assert found[1].name == "whole"
    assert first_jump(quiet, quiet) is None
    assert merge_calls([]) == []
    assert math.isnan(Merged("a", 0, "Module", 0, True, {}).magnitude("output"))


def test_of_ranks_the_one_whose_module_comes_first_is_told_and_the_bad_weights_of_all() -> None:
    def told(direction: str, depth: int | None, *weights: str) -> dict[str, Any]:
        return {"direction": direction, "depth": depth, "weight_nonfinite": [*weights], "input_nonfinite": depth == 7}

    ranks = [None, told("backward", 0), told("forward", None, "a"), told("forward", 7), told("forward", 3, "b", "a")]
    assert earliest(ranks) == told("forward", 3, "a", "b") | {"input_nonfinite": True}
    assert earliest(ranks[:3]) == told("forward", None, "a")
    assert earliest([None]) is None
