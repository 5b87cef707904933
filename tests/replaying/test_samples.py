"""Which samples make the loss of a batch: planted ones are found, and odd batches are refused or taken, never wrong."""

from __future__ import annotations

import copy
import math
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_function
from stages_small import Classifier, SmallStage, blobs, evidence_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from normzoo import create_norm
from normzoo.replaying import data_or_state
from normzoo.replaying.bisection import Bisection, micro_batches
from normzoo.replaying.held_statistics import BatchStatisticsLayers
from normzoo.replaying.sample_facts import has_dropout
from normzoo.replaying.samples import ask

Item = namedtuple("Item", "x y note")


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def normed(norm: Any = nn.BatchNorm1d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 3))


def stage_of(net: nn.Module, batch: Any, quiet: int = 3, loss: nn.Module | None = None, **options: Any) -> SmallStage:
    """Quiet batches of 16 samples, and then this one."""
    steps = [[list(blobs(16, seed))] for seed in range(quiet)]
    module = net if hasattr(net, "training_step") else Classifier(net, loss)
    return SmallStage(module, [*steps, [batch]], **options)


def asked(stage: SmallStage, kind: str = "divergence") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    evidence = evidence_of(stage, stage.steps[-1], kind)
    stage.go_to(stage.steps[-1])
    module = stage.module
    state, streams = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    flags = [(m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    records = ask(stage, evidence)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), streams)
    assert all(p.grad is None for p in module.parameters())
    assert flags == [
        (m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()
    ]
    rows = [row for schema, of_schema in records for row in of_schema]
    for schema, of_schema in records:
        assert all(row.keys() == {column.name for column in schema.columns} for row in of_schema)
    return evidence["samples"], rows


def rows_of(facts: dict[str, Any], count: int) -> list[int]:
    return [row["row"] for row in facts["worst"][:count]]


def test_losses_are_those_of_single_samples_in_float64() -> None:
    batch = list(blobs(12, 9))
    batch[1][4] = (batch[1][4] + 1) % 3
    net = plain()
    stage = stage_of(net, batch, lr=0.0)
    facts, rows = asked(stage)
    twin = copy.deepcopy(net).double()
    exact = nn.functional.cross_entropy(twin(batch[0].double()), batch[1], reduction="none")
    assert [row["loss"] for row in rows] == pytest.approx(exact.tolist(), rel=1e-5)
    assert [row["share"] for row in rows] == pytest.approx((exact / exact.sum()).tolist(), rel=1e-5)
    assert facts["possible"]
    assert facts["check"] < 1e-6
    assert facts["batch_loss"] == pytest.approx(exact.mean().item(), rel=1e-5)
    assert (facts["samples"], facts["evaluated"], facts["reduction"]) == (12, 12, "the mean over samples")
    assert rows_of(facts, 8) == exact.argsort(descending=True)[:8].tolist()
    assert facts["median"] == pytest.approx(exact.sort().values[5].item(), rel=1e-5)
    worst = int(exact.argmax())
    one = nn.functional.cross_entropy(twin(batch[0][worst : worst + 1].double()), batch[1][worst : worst + 1])
    gradient = torch.autograd.grad(one, list(twin.parameters()))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradient))
    assert facts["worst"][0]["gradient"] == pytest.approx(norm, rel=1e-5)
    assert facts["median_gradient"] > 0
    assert facts["alone"] is None


def test_with_batch_norm_losses_are_those_by_the_statistics_of_the_batch() -> None:
    batch = list(blobs(12, 9))
    net = normed()
    facts, rows = asked(stage_of(net, batch, lr=0.0))
    twin = copy.deepcopy(net).double()
    exact = nn.functional.cross_entropy(twin(batch[0].double()), batch[1], reduction="none")
    assert [row["loss"] for row in rows] == pytest.approx(exact.tolist(), rel=1e-5)
    assert (facts["held"], facts["statistics_of"]) == (["net.1"], 3)
    assert facts["check"] < 1e-6
    assert facts["alone"]["statistics_of"] in (0, 1, 2)


def test_a_sample_that_moves_the_statistics_of_its_batch_is_found_by_those_of_a_quiet_one() -> None:
    batch = list(blobs(16, 9))
    batch[0][5] *= 1e6
    facts, rows = asked(stage_of(normed(), batch))
    assert facts["possible"]
    assert facts["alone"]["worst"][0]["row"] == 5
    assert facts["alone"]["worst"][0]["loss"] > 100 * facts["alone"]["median"]
    assert rows[5]["alone"] > 100 * rows[4]["alone"]
    assert [(row["row"], row["layer"]) for row in facts["moved"]] == [(5, "net.1")]
    assert facts["moved"][0]["share"] == pytest.approx(15 / 16, rel=1e-3)
    assert facts["without"]["rows"] == [{"row": 5, "rank": 0, "micro_batch": 0, "id": None}]


def test_a_sample_that_moves_the_statistics_is_found_where_its_own_loss_is_small() -> None:
    net = normed()
    steps = [[list(blobs(16, seed))] for seed in range(60)]
    trained = SmallStage(Classifier(net), steps, lr=0.5)
    trained.go_to(59)
    batch = list(blobs(16, 99))
    with torch.no_grad():
        batch[0][5] *= 1e5
        net.eval()
        batch[1][5] = net(batch[0][5:6]).argmax()  # by other statistics the sample is classified rightly, and surely
        net.train()
    facts, _ = asked(stage_of(net, batch, lr=0.0))
    assert facts["possible"]
    assert facts["alone"]["mean"] < facts["batch_loss"] / 2
    assert facts["alone"]["worst"] == []
    assert [row["row"] for row in facts["moved"]] == [5]
    assert [row["row"] for row in facts["without"]["rows"]] == [5]
    assert facts["without"]["loss"] < facts["batch_loss"] / 2


def test_of_a_quiet_batch_nothing_stands_out() -> None:
    for make in (plain, normed):
        facts, _ = asked(stage_of(make(), list(blobs(16, 9))))
        assert (facts["moved"], facts["without"]) == ([], None)


@pytest.mark.parametrize("make", [plain, normed])
def test_a_sample_with_nan_is_found_even_if_it_spoils_the_statistics(make: Any) -> None:
    batch = list(blobs(16, 9))
    batch[0][5, 2] = math.nan
    facts, rows = asked(stage_of(make(), batch))
    assert facts["possible"]
    assert (facts["nonfinite"], rows_of(facts, 1)) == (1, [5])
    assert math.isnan(facts["batch_loss"])
    assert facts["worst"][0]["share"] is None
    assert math.isfinite(facts["median"])
    assert [row["row"] for row in facts["without"]["rows"]] == [5]
    assert math.isfinite(facts["without"]["loss"])
    assert facts["statistics_of"] == (1 if make is normed else None)
    assert [row["row"] for row in rows if not math.isfinite(row["loss"])] == [5]


def test_without_another_batch_statistics_that_are_not_finite_are_told() -> None:
    batch = list(blobs(16, 9))
    batch[0][5, 2] = math.nan
    facts, rows = asked(stage_of(normed(), batch, quiet=0))
    assert not facts["possible"]
    assert "statistics of net.1 are not finite; there is no other batch" in facts["why_not"]
    assert not rows


@given(samples=st.integers(65, 700), data=st.data())
@settings(max_examples=4, deadline=None)
def test_of_a_large_batch_few_passes_find_the_planted_samples(samples: int, data: st.DataObject) -> None:
    batch = list(blobs(samples, 9))
    planted = data.draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=3, unique=True))
    for i, row in enumerate(planted):
        batch[0][row] = 1e4 * (i + 1) * (1 - 2 * batch[0][row].sign())
        batch[1][row] = plain()(batch[0][row]).argmin()
    stage = stage_of(plain(), batch, lr=0.0)
    stage.go_to(3)
    before = stage.passes["forward"]
    facts, rows = asked(stage)
    assert stage.passes["forward"] - before <= 260
    assert facts["possible"]
    assert set(rows_of(facts, len(planted))) == set(planted)
    assert sum(row["samples"] for row in rows) == facts["samples"] == samples
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert facts["worst"][0]["share"] > 1 / 3
    assert facts["median"] < facts["worst"][0]["loss"] / 100


def test_micro_batches_and_ids() -> None:
    micros = [list(blobs(8, seed)) for seed in (5, 6, 7)]
    micros[1][0][2] *= 1e5
    ids = [[[f"{n}-{i}" for i in range(8)] for n in range(3)]]
    stage = SmallStage(Classifier(plain()), [micros], ids=ids, rank_of=[0, 1, 0])
    facts, rows = asked(stage)
    worst = facts["worst"][0]
    assert (worst["row"], worst["rank"], worst["micro_batch"], worst["id"]) == (2, 1, 0, "1-2")
    assert worst["share"] > 0.9
    assert facts["without"]["rows"] == [{"row": 2, "rank": 1, "micro_batch": 0, "id": "1-2"}]
    assert facts["without"]["loss"] < facts["batch_loss"] / 10
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert {(row["rank"], row["micro_batch"]) for row in rows} == {(0, 0), (1, 0), (0, 1)}
    assert len({row["hash"] for row in facts["worst"]}) == 8


class Tokens(nn.Module):
    """A mean over the tokens that are not padding, which is none over samples."""

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.shifted = nn.Embedding(12, 8), nn.Linear(8, 12), shifted

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        logits, labels = self.head(self.embedding(batch["tokens"])), batch["labels"]
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("shifted", [False, True])
def test_means_over_tokens_of_different_lengths_are_weighed_by_these(shifted: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(1, 12, (6, 20))
    labels = tokens.clone()
    for i, length in enumerate((3, 20, 5, 12, 2, 1)):
        labels[i, length:] = -100
    module = Tokens(shifted)
    module.head.weight.data *= 5
    stage = SmallStage(module, [[{"tokens": tokens, "labels": labels}]])
    facts, rows = asked(stage)
    assert facts["possible"], facts["why_not"]
    assert "that are not -100" in facts["reduction"]
    assert ("after the first" in facts["reduction"]) == shifted
    assert facts["check"] < 1e-5
    assert sum(row["share"] or 0.0 for row in rows) == pytest.approx(1)
    assert [row["row"] for row in rows if row["loss"] is None] == [5] * shifted  # its only token is the first
    assert facts["nonfinite"] == 0


def test_a_sum_over_samples_is_known_as_one() -> None:
    facts, rows = asked(stage_of(plain(), list(blobs(9, 9)), loss=nn.CrossEntropyLoss(reduction="sum"), lr=0.0))
    assert (facts["possible"], facts["reduction"]) == (True, "the sum over samples")
    assert sum(row["share"] for row in rows) == pytest.approx(1)


class Contrasting(nn.Module):
    """Each sample against all others of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 4)

    def training_step(self, batch: Any) -> Tensor:
        z = self.net(batch[0])
        return nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)))


class Mixing(nn.Module):
    """Takes the mean of the batch from each sample, as no known layer does."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * (x - x.mean(0))


@pytest.mark.parametrize("net", [Contrasting(), nn.Sequential(nn.Linear(6, 8), Mixing(), nn.Linear(8, 3))])
def test_losses_that_are_not_of_single_samples_are_refused(net: nn.Module) -> None:
    torch.manual_seed(0)
    facts, rows = asked(stage_of(net, list(blobs(12, 9)), lr=0.0))
    assert not facts["possible"]
    assert "% away from what the losses of its samples make" in facts["why_not"]
    assert facts["worst"] == rows == []


class Refusing(nn.Module):
    """Does not take a single sample."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.net, self.least = nn.Linear(6, 3), least

    def training_step(self, batch: Any) -> Tensor:
        if len(batch[0]) < self.least:
            raise ValueError(f"expected {self.least} samples")
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def test_a_step_that_takes_no_single_sample_is_told() -> None:
    facts, rows = asked(stage_of(Refusing(2), list(blobs(12, 9))))
    assert not facts["possible"]
    assert "does not take parts of the batch: ValueError: expected 2 samples" in facts["why_not"]
    assert not rows


def test_parts_whose_samples_cannot_pass_alone_stay_whole() -> None:
    batch = list(blobs(200, 9))
    batch[0][77] *= 1e4
    module = Refusing(10)
    batch[1][77] = module.net(batch[0][77]).argmin()
    facts, rows = asked(stage_of(module, batch))
    assert facts["possible"]
    assert facts["evaluated"] == 0
    assert max(rows, key=lambda row: row["loss"])["row"] == 75
    assert sum(row["samples"] for row in rows) == 200


@pytest.mark.parametrize("make", [plain, normed])
@pytest.mark.parametrize("size", [16, 150])
def test_the_samples_that_raise_an_error_are_found(make: Any, size: int) -> None:
    batch = list(blobs(size, 9))
    batch[1][13] = 7
    batch[1][2] = -1
    stage = stage_of(make(), batch, ids=None)
    facts, rows = asked(stage, "exception")
    assert facts["possible"]
    assert facts["error"].startswith("IndexError: Target")
    assert facts["raising"] == [{"rank": 0, "micro_batch": 0, "row": row, "id": None} for row in (2, 13)]
    assert not rows


class Broken(nn.Module):
    """Raises whatever the batch is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any) -> Tensor:
        raise KeyError("no such column")


def test_an_error_of_any_batch_is_of_no_sample() -> None:
    stage = stage_of(plain(), list(blobs(8, 9)))
    stage.go_to(3)
    stage.keep()
    stage.module.training_step = Broken(plain()).training_step
    evidence = evidence_of(stage, 3, "exception")
    ask(stage, evidence)
    facts = evidence["samples"]
    assert not facts["possible"]
    assert "raises an error as well: KeyError: 'no such column'" in facts["why_not"]
    assert facts["raising"] == []


def test_dropout_is_told_and_widens_what_is_accepted() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.2), nn.Linear(64, 3))
    stage = stage_of(net, list(blobs(32, 9)))
    facts, _ = asked(stage)
    assert facts["dropout"]
    assert facts["possible"]
    assert 0 < facts["check"] < 0.25
    assert any("ropout" in note for note in stage.notes)
    assert not has_dropout(net.eval())
    assert has_dropout(nn.LSTM(2, 2, num_layers=2, dropout=0.1))
    assert has_dropout(nn.MultiheadAttention(4, 2, dropout=0.1))
    assert not has_dropout(nn.Sequential(nn.Dropout(0.0), nn.MultiheadAttention(4, 2)))


class Taking(nn.Module):
    """Takes a batch of any structure whose first tensor is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def training_step(self, batch: Any) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        if isinstance(x, list | tuple):
            return sum(self.net(one).square().mean() for one in x) / len(x)
        return nn.functional.cross_entropy(self.net(x), y)


X, Y = blobs(5, 1)


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y, None, "name", ["a", "b", "c", "d", "e"]),
        {"x": X, "y": Y, "weight": torch.tensor(2.0), "path": [f"{i}.png" for i in range(5)]},
        Item(X, Y, None),
        (list(X), list(Y)),
        (X[:1], Y[:1]),
    ],
)
def test_batches_of_many_kinds_are_divided(batch: Any) -> None:
    facts, _ = asked(SmallStage(Taking(), [[batch]]))
    assert facts["possible"], facts["why_not"]
    assert facts["samples"] == facts["evaluated"]
    assert facts["check"] < 1e-5


@pytest.mark.parametrize(
    ("batch", "why_not"),
    [
        (pack_sequence([X, X[:2]]), "does not have a row for each sample"),
        ((X, Y[:3]), "a tensor of shape (3,) in a batch of 5 samples"),
        ((X[:0], Y[:0]), "the batch is empty"),
        ((torch.tensor(3.0), None), "no tensor with a dimension of samples"),
    ],
)
def test_batches_that_are_not_divided_are_told(batch: Any, why_not: str) -> None:
    facts, rows = asked(SmallStage(Taking(), [[batch]]))
    assert not facts["possible"]
    assert why_not in facts["why_not"]
    assert not rows


def test_a_step_that_is_not_there() -> None:
    stage = SmallStage(Taking(), [[(X, Y)]], alarm=4)
    evidence = {"about": {"kind": "exception"}}
    assert ask(stage, evidence) == []
    assert evidence["samples"]["why_not"] == "the step at the alarm cannot be made again"


def test_gradients_that_cannot_be_had_are_none() -> None:
    stage = SmallStage(Taking(), [[(X, Y)]])

    def fails(*_: Any) -> Any:
        raise RuntimeError("no graph")

    stage.gradient_of_batch = fails
    facts, _ = asked(stage)
    assert facts["possible"]
    assert facts["median_gradient"] is None
    assert all(row["gradient"] is None for row in facts["worst"])


def check_ranks(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    batch = list(blobs(40 + 60 * rank, rank))  # 100 samples on rank 1: more passes than on rank 0
    if rank == 1:
        batch[0][33] *= 1e5
    stage = SmallStage(Counting(), [[batch]])
    evidence = evidence_of(stage, 0)
    [(_, rows)] = ask(stage, evidence)
    facts = evidence["samples"]
    assert len({str(value) for value in stage.gather((facts, rows))}) == 1
    assert (facts["possible"], facts["samples"]) == (True, 140)
    assert [facts["worst"][0][key] for key in ("rank", "row")] == [1, 33]
    assert len(set(stage.gather(stage.module.calls))) == 1

    quiet, batch = list(blobs(8, 5)), list(blobs(8, rank))
    if rank == 1:
        batch[1][6] = 9  # the other rank raises nothing
    stage = SmallStage(Classifier(plain()), [[quiet], [batch]])
    evidence = evidence_of(stage, 1, "exception")
    data_or_state.ask(stage, evidence)
    ask(stage, evidence)
    assert len({str(value) for value in stage.gather(evidence)}) == 1
    assert "Target 9" in evidence["data_or_state"]["raises"][0][0]
    assert evidence["data_or_state"]["raises"][1] == [None, None]
    assert evidence["samples"]["raising"] == [{"rank": 1, "micro_batch": 0, "row": 6, "id": None}]

    stage = SmallStage(Classifier(normed(lambda size: create_norm("batch", size, sync=True))), [[quiet], [batch]])
    evidence = evidence_of(stage, 1, "exception")
    data_or_state.ask(stage, evidence)
    ask(stage, evidence)
    assert "data_or_state" not in evidence
    assert "the batch that raised an error is not tried again" in stage.notes[0]
    assert evidence["samples"]["why_not"] == "ranks wait for each other within a pass of this module"


class Counting(nn.Module):
    """Has a collective in each pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.calls = nn.Linear(6, 3), 0

    def training_step(self, batch: Any) -> Tensor:
        self.calls += 1
        torch.distributed.all_reduce(torch.zeros(1))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def test_ranks_make_as_many_passes_and_tell_the_same(tmp_path: Path) -> None:
    run_function(tmp_path, check_ranks, 2, str(tmp_path), deadline=100)


def test_a_bisection_covers_each_sample_once() -> None:
    stage = SmallStage(Taking(), [[list(blobs(100, 1)), list(blobs(31, 2))]])
    micros = micro_batches(stage, 0)
    parts = Bisection(stage, 0, micros, BatchStatisticsLayers(stage.module)).parts({})
    for micro, size in zip(micros, (100, 31), strict=True):
        own = [part for part in parts if part.micro is micro]
        assert [i for part in own for i in range(part.start, part.stop)] == list(range(size))
