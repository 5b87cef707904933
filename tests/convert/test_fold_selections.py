"""Folding and calibrating models that select by their values: detectors, thresholds, top-k."""

from __future__ import annotations

import pytest
import torch
import torchvision
from convert.folding import assert_untouched, snapshot, trained
from sweeps import few
from torch import nn

from normzoo.convert import _fold
from normzoo.convert._selections import Selections
from normzoo.fold import fold_norms


class Thresholds(nn.Module):
    """What it returns depends on its values: how many, which, and in which order."""

    def __init__(self, select):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)
        self.select = [select]

    def forward(self, x):
        return self.select[0](self.head(self.bn(self.conv(x)).relu()))


def nms(y):
    boxes = y[:, :4].flatten(2).mT.flatten(0, 1)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:].abs() + 0.1], 1)
    scores = y[:, 4].flatten()
    kept = torchvision.ops.nms(boxes, scores, 0.3)
    return [{"boxes": boxes[kept], "scores": scores[kept], "labels": kept}]


def by_python(y):
    values = y.flatten()
    return [v for v in values if v.item() > 0.1]


class Instances:
    def __init__(self, **fields):
        self.fields = fields


SELECT = {
    "mask": lambda y: y[y > 0.1],
    "masked_select": lambda y: y.masked_select(y > 0.1),
    "nonzero": lambda y: (y * 1, y[(y > 0.1).nonzero(as_tuple=True)]),
    "where": lambda y: y[torch.where(y > 0.1)],
    "argwhere": lambda y: y.flatten()[torch.argwhere(y.flatten() > 0.1)[:, 0]],
    "topk": lambda y: y.flatten(1).topk(7),
    "sort": lambda y: y.flatten(1).sort(descending=True),
    "sort.stable": lambda y: torch.sort(y.flatten(1), stable=True),
    "argsort": lambda y: y.flatten()[y.flatten().argsort()],
    "max": lambda y: (y.max(1), y.max()),
    "min, kept": lambda y: y.min(1, keepdim=True),
    "argmax": lambda y: y.argmax(1).double() * y.mean(1),
    "median": lambda y: y.flatten(1).median(1),
    "unique": lambda y: torch.unique(y.round(decimals=1)),
    "item": by_python,
    "nms": nms,
    "objects": lambda y: Instances(scores=y[y > 0.1], mask=y > 0.1),
    "integers alone": lambda y: y.argmax(1),
    "sizes alone": lambda y: int((y > 0.1).sum()),
    "through numpy": lambda y: y.flatten()[torch.from_numpy(y.flatten().numpy() > 0.1)],
}


@pytest.mark.parametrize("case", few(SELECT, *list(SELECT)[::4]))
def test_folding(case):
    """In low precision, rounding moves values over the thresholds."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = trained(Thresholds(SELECT[case]), seed)
        x = torch.randn(2, 3, 24, 24)
        assert len(fold_norms(model, x)) == 1


@pytest.mark.parametrize("case", SELECT)
def test_a_wrong_fold_is_seen(monkeypatch, case):
    """Plant: scales that are not those of the norm."""
    real = _fold.fused

    def wrong(pair, **options):
        weight, bias = real(pair, **options)
        return weight.index_fill(0, torch.tensor([2]), 1.0), bias

    monkeypatch.setattr(_fold, "fused", wrong)
    model = trained(Thresholds(SELECT[case]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="the outputs of .* moved by .* Nothing was folded"):
        fold_norms(model, torch.randn(2, 3, 24, 24))
    assert_untouched(model, before)


def test_selections_are_repeated():
    """Of another input, in the order of execution, until the runs part."""
    x, other = torch.randn(4, 9), torch.randn(4, 9)
    kept = [x > 0.5, x.topk(2).indices, x.argmax(1), x.sort(1, descending=True).indices, x.max(0).indices]
    first = Selections()

    def run(y):
        return (
            y[y > 0.5],
            y.topk(2),
            y.argmax(1),
            y.sort(1, descending=True),
            y.max(0),
            float(y.sum()),
            y.max(),
            y.median(),
        )

    with first.recorded():
        run(x)
    with first.repeated():
        mask, topk, argmax, ordered, largest, total, top, _ = run(other)
        assert torch.equal(other.argmax(1), other.argmax(1))  # beyond what was recorded
    assert torch.equal(mask, other[kept[0]])
    assert torch.equal(topk[0], other.gather(1, kept[1]))
    assert torch.equal(topk[1], kept[1])
    assert torch.equal(argmax, kept[2])
    assert torch.equal(ordered[0], other.gather(1, kept[3]))
    assert torch.equal(largest[0], other.gather(0, kept[4][None])[0])
    assert total == float(x.sum())
    assert top == other.max()
    with first.repeated():  # what comes before a selection that is repeated is not repeated after it
        assert torch.equal(other.argmax(1), kept[2])
        assert torch.equal(run(other)[0], other[other > 0.5])


class FirstRun(Thresholds):
    """Selects in its first run what it keeps for all others, as the pooling of torchvision's detectors does."""

    def __init__(self):
        super().__init__(lambda y: y)
        self.shift = None

    def forward(self, x):
        y = super().forward(x)
        if self.shift is None:
            self.shift = y.std().log2().round().item()
        values = y.flatten()
        first = int(values.argmax().item())
        return values[values > 0.1].mean() + 2**self.shift, values.roll(-first)


def test_what_a_first_run_selects_for_later_ones():
    import normzoo

    x = torch.randn(2, 3, 24, 24)
    model = trained(FirstRun())
    assert len(fold_norms(model, x)) == 1
    model = trained(FirstRun())
    report = normzoo.convert_norms(model, "batch_renorm", calibrate=x.split(1))
    assert report.after.relative < 1e-4


DETECTORS = {
    "ssdlite320_mobilenet_v3_large": {},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"rpn_post_nms_top_n_test": 60},
    "retinanet_resnet50_fpn_v2": {"min_size": 96, "max_size": 128},
    "fcos_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "fasterrcnn_resnet50_fpn_v2": {"min_size": 96, "max_size": 128, "rpn_post_nms_top_n_test": 60},
    "maskrcnn_resnet50_fpn": {"min_size": 96, "max_size": 128, "rpn_post_nms_top_n_test": 60},
    "keypointrcnn_resnet50_fpn": {"min_size": 96, "max_size": 128, "rpn_post_nms_top_n_test": 60},
}


def detector(name: str, seed: int, **options) -> nn.Module:
    torch.manual_seed(seed)
    classes = 2 if name.startswith("keypoint") else 3
    build = getattr(torchvision.models.detection, name)
    # the backbones of some are frozen norms, whose statistics a seed does not move
    model = build(weights=None, weights_backbone=None, num_classes=classes, **DETECTORS[name], **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d):
            module.running_var.uniform_(0.8, 1.2)
            module.running_mean.normal_(0, 0.1)
    return model


def images():
    return [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "name",
    [
        "ssdlite320_mobilenet_v3_large",
        *(pytest.param(n, marks=pytest.mark.slow) for n in DETECTORS if n != "ssdlite320_mobilenet_v3_large"),
    ],
)
def test_detectors_fold_whole(name, seed):
    model = detector(name, seed)
    norms = sum(isinstance(m, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d) for m in model.modules())
    report = fold_norms(model, example=(images(),))
    assert len(report) == norms
    assert all(left.layer == "GroupNorm (group)" for left in report.left)  # of the heads of some
    assert not any(isinstance(m, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d) for m in model.modules())
