"""The two-by-two test of batch and weights, and parameters put back, against the same by hand."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stages_small import Classifier, SmallStage, blobs, evidence_of
from torch import Tensor, nn

from normzoo.replaying.data_or_state import ask, onset_of, quiet_steps
from normzoo.replaying.parameters import growth, largest
from normzoo.replaying.tensor_sizes import gradient_norms, kinds_of, norms


class Scaled(nn.Module):
    """A linear classifier whose logits have a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 3), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


def batches(count: int = 10, size: int = 16) -> list[list[Any]]:
    return [[list(blobs(size, seed))] for seed in range(count)]


def asked(stage: SmallStage, onset: int, kind: str = "divergence") -> dict[str, Any]:
    evidence = evidence_of(stage, onset, kind)
    stage.go_to(stage.steps[0])
    before = {name: t.clone() for name, t in stage.tensors().items()}
    streams = torch.get_rng_state()
    assert ask(stage, evidence) == []
    assert torch.equal(torch.get_rng_state(), streams)
    stage.go_to(stage.steps[0])
    assert all(torch.equal(t, before[name]) for name, t in stage.tensors().items())
    return evidence


def test_the_losses_and_norms_are_those_by_hand() -> None:
    torch.manual_seed(0)
    steps, net = batches(), nn.Linear(6, 3)
    twin = copy.deepcopy(net)
    stage = SmallStage(Classifier(net), steps)
    facts = asked(stage, 6)["data_or_state"]

    def at(step: int) -> nn.Module:
        model = copy.deepcopy(twin)
        for x, y in [micros[0] for micros in steps[:step]]:
            for p, g in zip(model.parameters(), gradient(model, x, y), strict=True):
                p.data -= 0.1 * g
        return model

    def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))

    other = facts["other"]
    assert facts["batch"] == 6
    assert facts["weights"] == [6, 0]
    assert other < 6
    for row, step in enumerate((6, other)):
        for column, weights in enumerate((6, 0)):
            x, y = steps[step][0]
            model = at(weights)
            loss = nn.functional.cross_entropy(model(x), y).item()
            norm = math.sqrt(sum(g.square().sum().item() for g in gradient(model, x, y)))
            assert facts["loss"][row][column] == pytest.approx(loss, rel=1e-5)
            assert facts["norm"][row][column] == pytest.approx(norm, rel=1e-5)
    x, y = steps[other][0]
    assert facts["other_after"] == pytest.approx(nn.functional.cross_entropy(at(7)(x), y).item(), rel=1e-5)
    assert len(facts["others"]) == len(facts["others_first"]) == 5


def test_a_poisoned_batch_is_bad_on_both_weights_and_quiet_ones_on_neither() -> None:
    torch.manual_seed(0)
    steps = batches()
    steps[8][0][0][3] *= 1e4
    evidence = asked(SmallStage(Classifier(nn.Linear(6, 3)), steps), 8)
    facts = evidence["data_or_state"]
    (bad, bad_first), (quiet, quiet_first) = facts["loss"]
    assert min(bad, bad_first) > 10 * max(quiet, quiet_first, *facts["others"], *facts["others_first"])
    assert facts["other_after"] > 10 * quiet  # its update has broken the weights
    assert evidence["parameters"]["at"] == 9  # where they are bad
    assert evidence["inputs"][0]["rows"] == [3]


def test_bad_weights_are_bad_for_all_batches() -> None:
    torch.manual_seed(0)
    stage = SmallStage(Classifier(nn.Linear(6, 3)), batches(), lr=60.0)
    evidence = asked(stage, 6)
    facts = evidence["data_or_state"]
    (bad, first), (quiet, quiet_first) = facts["loss"]
    assert min(bad, quiet, *facts["others"]) > 2 * max(first, quiet_first)
    parameters = evidence["parameters"]
    assert parameters["at"] == 6
    assert parameters["loss_before"] == [quiet, bad]
    assert parameters["loss_all_back"] == parameters["loss_first"] == [quiet_first, first]


def test_a_scale_that_explodes_is_the_parameter_that_restores_the_loss_alone() -> None:
    torch.manual_seed(0)
    net = Classifier(Scaled())

    def grow(module: nn.Module) -> None:
        module.net.scale.data.mul_(-3.0)

    stage = SmallStage(net, batches(), disturb=dict.fromkeys(range(10), grow), lr=1e-6)
    found = asked(stage, 7)["parameters"]
    assert found["growth"][0]["name"] == "net.scale"
    assert found["growth"][0]["to"] > 100 * found["growth"][0]["from"]
    by_name = {row["name"]: row for row in found["put_back"]}
    assert by_name["net.scale"]["loss"][0] < 2 * found["loss_first"][0]
    assert by_name["net.scale"]["only"][0] > 10 * found["loss_first"][0]
    assert by_name["net.linear.weight"]["loss"][0] > 10 * found["loss_first"][0]
    assert by_name["net.linear.weight"]["only"][0] < 2 * found["loss_first"][0]
    assert by_name["net.linear"]["parameters"] == ["net.linear.weight", "net.linear.bias"]
    assert found["largest"][0]["name"] == "net.scale"
    assert found["largest"][0]["kind"] == "scalar"


def test_updates_of_the_course_are_read_and_those_of_weights_changed_from_outside_are_not_straight() -> None:
    torch.manual_seed(0)
    net = Classifier(Scaled())

    def grow(module: nn.Module) -> None:
        module.net.scale.data.add_(8.0)

    stage = SmallStage(net, batches(), disturb={3: grow}, lr=1e-3)
    evidence = evidence_of(stage, 6)
    evidence["course"]["updates"] = {"before": 6, "of": {"net.scale": [0.5, 0.1], "net.linear.weight": [3.0, 0.3]}}
    ask(stage, evidence)
    found = {fact["name"]: fact for fact in evidence["parameters"]["growth"]}
    assert found["net.scale"]["share"] == pytest.approx(0.25)
    assert found["net.scale"]["straightness"] == pytest.approx(16, rel=0.01)  # above 1: updates have not done it
    assert found["net.linear.bias"]["straightness"] is None


def test_a_nan_in_one_weight_is_put_back() -> None:
    torch.manual_seed(0)
    net = Classifier(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))

    def spoil(module: nn.Module) -> None:
        module.net[2].bias.data[1] = math.nan

    def at(step: int) -> dict[str, Any]:
        return asked(SmallStage(copy.deepcopy(net), batches(), disturb={4: spoil}), step)["parameters"]

    found = at(4)  # the loss of step 4 is the first that is bad, and the weights before it are not
    assert found["nonfinite"]
    stage = SmallStage(net, batches(), disturb={})
    stage.go_to(5)
    spoil(net)
    stage._kept[5] = copy.deepcopy(net.state_dict())
    found = asked(stage, 5)["parameters"]
    assert (found["at"], found["nonfinite"]) == (5, ["net.2.bias"])
    assert found["put_back"][0]["name"] == "net.2.bias"
    assert found["put_back"][0]["loss"][0] < 2 * found["loss_first"][0]
    assert math.isnan(found["loss_before"][0])


def test_where_most_weights_are_nan_none_of_them_is_put_back() -> None:
    torch.manual_seed(0)
    steps = batches()
    steps[8][0][0][3] = math.nan
    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)), nn.Linear(6, 3))
    found = asked(SmallStage(Classifier(net), steps), 8)["parameters"]
    assert (found["at"], len(found["nonfinite"]), found["put_back"]) == (9, 10, [])
    assert found["loss_all_back"][0] == found["loss_first"][0]


def test_an_onset_at_the_first_step_is_compared_with_later_batches_and_noted() -> None:
    torch.manual_seed(0)
    steps = batches(6)
    steps[0][0][0][2] *= 1e4
    stage = SmallStage(Classifier(nn.Linear(6, 3)), steps, first=40)
    evidence = asked(stage, 40)
    facts = evidence["data_or_state"]
    assert facts["weights"] == [40, 40]
    assert facts["other"] > 40
    assert all(row[0] == row[1] for row in facts["loss"])
    assert facts["loss"][0][0] > 10 * facts["loss"][1][0]
    assert facts["other_after"] > 10 * facts["loss"][1][0]
    assert any("step 40, is suspicious itself" in note for note in stage.notes)
    assert evidence["parameters"]["steps"] == [40, 40]


def test_a_ring_of_one_step_has_nothing_to_compare_with() -> None:
    stage = SmallStage(Classifier(nn.Linear(6, 3)), batches(1))
    facts = asked(stage, 0)
    assert facts["data_or_state"]["other"] is None
    assert facts["data_or_state"]["loss"][1] == [None, None]
    assert facts["parameters"]["growth"] == []
    assert facts["parameters"]["loss_first"][0] is None
    assert (facts["parameters"]["put_back"], facts["parameters"]["loss_all_back"]) == ([], None)


def test_a_step_that_raises_says_which_batch_raises_on_which_weights() -> None:
    steps = batches()
    steps[9][0][1][4] = 7
    evidence = asked(SmallStage(Classifier(nn.Linear(6, 3)), steps), 3, "exception")
    facts = evidence["data_or_state"]
    assert facts["batch"] == 9
    assert all("IndexError: Target 7" in error for error in facts["raises"][0])
    assert facts["raises"][1] == [None, None]
    assert facts["loss"][0] == [None, None]
    assert all(math.isfinite(loss) for loss in facts["loss"][1])
    assert facts["other_after"] is None
    assert "parameters" not in evidence


def test_an_error_in_a_divergence_is_not_hidden() -> None:
    steps = batches()
    steps[9][0][1][4] = 7
    stage = SmallStage(Classifier(nn.Linear(6, 3)), steps)
    with pytest.raises(IndexError, match="Target 7"):
        ask(stage, evidence_of(stage, 9))


def test_a_step_that_is_not_there_is_noted() -> None:
    stage = SmallStage(Classifier(nn.Linear(6, 3)), batches(3), alarm=7)
    evidence = evidence_of(stage, 7)
    assert ask(stage, evidence) == []
    assert onset_of(stage, evidence) is None
    assert "cannot be made again" in stage.notes[0]


@given(
    losses=st.lists(st.one_of(st.floats(0, 10), st.just(math.nan), st.none()), min_size=1, max_size=12),
    place=st.integers(0, 11),
)
def test_quiet_steps_are_before_the_onset_if_any_is_and_the_first_is_typical(
    losses: list[float | None], place: int
) -> None:
    onset = place % len(losses)
    stage = SmallStage(nn.Linear(1, 1), [[torch.zeros(1)]] * len(losses))
    evidence = {"about": {"kind": "divergence"}, "course": {"steps": stage.steps, "loss": losses, "onset": onset}}
    quiet = quiet_steps(stage, evidence, onset)
    finite = [s for s in range(onset) if losses[s] is not None and math.isfinite(losses[s])]
    earlier = finite or [s for s in range(onset) if losses[s] is None]
    assert len(quiet) == len(set(quiet)) <= 6
    assert set(quiet) <= set(earlier or range(onset + 1, len(losses)))
    assert bool(quiet) == bool(earlier or onset + 1 < len(losses))
    if finite:
        below = sum(losses[s] < losses[quiet[0]] for s in earlier)
        above = sum(losses[s] > losses[quiet[0]] for s in earlier)
        assert max(below, above) <= (len(earlier) + 1) / 2


@given(seed=st.integers(0, 1000), steps=st.integers(1, 5))
def test_growth_is_that_of_float64(seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (4, 3), "a.bias": (3,), "scale": ()}
    path = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(steps + 1)]
    norms_of = {n: [(b[n] - a[n]).norm().item() for a, b in itertools.pairwise(path)] for n in shapes}
    updates = {n: (sum(of), sum(u**2 for u in of)) for n, of in norms_of.items()}
    gradient = {n: float(i + 1) for i, n in enumerate(shapes)}
    facts, candidates = growth(path[0], path[-1], updates, gradient, dict.fromkeys(shapes, "matrix"))
    assert {fact["name"] for fact in facts} == set(candidates) == set(shapes)
    squares = {n: square for n, (_, square) in updates.items()}
    for fact in facts:
        first, last = path[0][fact["name"]].double(), path[-1][fact["name"]].double()
        moved = (last - first).norm().item()
        assert fact["from"] == pytest.approx(first.norm().item(), rel=1e-6)
        assert fact["to"] == pytest.approx(last.norm().item(), rel=1e-6)
        assert fact["share"] == pytest.approx(squares[fact["name"]] / sum(squares.values()), rel=1e-5)
        assert fact["straightness"] == pytest.approx(moved / updates[fact["name"]][0], rel=1e-5)
        assert fact["straightness"] < 1 + 1e-5
        assert fact["gradient_share"] == pytest.approx(gradient[fact["name"]] ** 2 / 14)


def test_a_parameter_that_is_large_for_its_kind_comes_first() -> None:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)), nn.LayerNorm(8))
    net[3].weight.data.mul_(50.0)
    parameters = dict(net.named_parameters())
    found = largest({n: p.detach() for n, p in parameters.items()}, kinds_of(net))
    assert found[0]["name"] == "3.weight"
    assert found[0]["rms"] == pytest.approx(50 * found[0]["kind_median"], rel=0.5)
    assert kinds_of(net)["5.weight"] == "norm weight"
    assert kinds_of(net)["5.bias"] == "norm bias"


def test_norms_of_odd_tensors() -> None:
    tensors = {"half": torch.full((4,), 300.0).half(), "complex": torch.tensor([3 + 4j]), "empty": torch.zeros(0)}
    assert norms({**tensors, "big": torch.tensor([1e30, 1e30])}) == pytest.approx(
        {"half": 600.0, "complex": 5.0, "empty": 0.0, "big": math.sqrt(2) * 1e30}, rel=1e-3
    )
    assert norms({}) == {}
    assert gradient_norms(SmallStage(nn.Linear(1, 1), batches(1)), {"weight": torch.ones(1, 4)}) == {"weight": 2.0}
