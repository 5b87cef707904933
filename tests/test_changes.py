"""The functions that change layers in place answer alike: what was changed, what was left, and why."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

import normzoo
from normzoo.changes import ChangeReport, CountReport

IMAGES = [torch.randn(4, 3, 6, 6) for _ in range(2)]


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.relu()) * x


class WithDropout(nn.Module):
    """Norm-like, and none that is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x / x.std(1, keepdim=True).square() * self.weight.view(-1, 1, 1)


def model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.GroupNorm(2, 8),
        Doubled(8),
        nn.BatchNorm2d(8, track_running_stats=False),
        normzoo.create_norm("online", 8),
        normzoo.create_norm("frozen_batch", 8),
        WithDropout(),
    ).eval()


FUNCTIONS = {
    "convert_norms": lambda m: normzoo.convert_norms(m, "group", include=nn.BatchNorm2d, exclude=Doubled),
    "fold_norms": lambda m: normzoo.fold_norms(m, IMAGES[0]),
    "freeze_norms": normzoo.freeze_norms,
    "reestimate_statistics": lambda m: normzoo.reestimate_statistics(m, IMAGES),
    "standardize_weights": normzoo.standardize_weights,
}
CHANGED = {
    "convert_norms": ["1", "5"],
    "fold_norms": ["1"],
    "freeze_norms": ["1"],
    "reestimate_statistics": ["1", "4"],
    "standardize_weights": ["0"],
}
# What is left, and a part of the reason
LEFT = {
    "convert_norms": {
        "3": "include does not choose it",
        "4": "exclude leaves it",
        "6": "include does not choose it",
        "7": "include does not choose it",
    },
    "fold_norms": {
        **dict.fromkeys("356", "in evaluation it is not a fixed scale and shift of channels"),
        "7": "no convolution or linear layer is right behind it",
        "4": "its class Doubled has a forward of its own",
        "8": "its values depend on each other as in no known norm",
    },
    "freeze_norms": {
        "3": "in evaluation it is not a scale and shift by running statistics",
        "4": "its class Doubled has a forward of its own",
        "5": "it keeps no running statistics",
        "6": "in evaluation it is not a scale and shift",
        "7": "it is frozen already",
    },
    "reestimate_statistics": {"6": "of a stream of samples", "7": "it is frozen"},
    "standardize_weights": {},
}
NUMBERS = [name for name in FUNCTIONS if name not in ("convert_norms", "freeze_norms")]


def report_of(name: str) -> ChangeReport:
    return FUNCTIONS[name](model())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reports_say_what_was_changed_and_what_was_left(name):
    report = report_of(name)
    assert isinstance(report, ChangeReport)
    assert [site.name for site in report.changed] == CHANGED[name]
    assert {site.name: LEFT[name].get(site.name, "?") in site.why for site in report.left} == dict.fromkeys(
        LEFT[name], True
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_length_truth_iteration_and_text(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = report_of(name)
        assert len(report) == len(CHANGED[name])
        assert report
        assert not type(report)([], report.left)
        assert [site.name for site in report] == CHANGED[name]
        text = str(report)
        assert f"{report}" == text
        assert repr(report) == f"{type(report).__name__}({len(report.changed)} changed, {len(report.left)} left)"
        assert report != object()
    for site in report.left:
        assert site.why[:20] in text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_plain_data_and_copies(name):
    report = report_of(name)
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [site["name"] for site in data["changed"]] == CHANGED[name]
    assert {site["name"] for site in data["left"]} == set(LEFT[name])
    for again in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert again.to_dict() == data
        assert str(again) == str(report)


def test_names_are_printed_as_they_are():
    net = nn.Sequential()
    net.add_module("[red]", nn.BatchNorm2d(3))
    assert "[red]" in str(normzoo.convert_norms(net, "group"))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "use",
    [
        lambda r, n: r == n,
        lambda r, n: n == r,
        lambda r, n: r != n + 1,
        lambda r, n: int(r) == n,
        lambda r, n: range(9)[r] == n,
        lambda r, n: r > 0 and r >= n and r < n + 1 and r <= n,
        lambda r, n: 0 < r,  # noqa: SIM300
        lambda r, n: r + 1 == n + 1 and 1 + r == n + 1 and r - 1 == n - 1 and 3 - r == 3 - n,
        lambda r, n: 2 * r == r * 2 == 2 * n and r / 2 == n / 2 and 2 / r == 2 / n and 2.5 + r == 2.5 + n,
        lambda r, n: r // 2 == n // 2 and r % 2 == n % 2 and 5 // r == 5 // n and 5 % r == 5 % n,
        lambda r, n: sum([r, r]) == 2 * n,
        lambda r, n: r + r == 2 * n,
        lambda r, n: f"{r:d} layers" == f"{n} layers",
        lambda r, n: "%d" % r == str(n),  # noqa: UP031
    ],
)
def test_code_that_takes_it_for_a_number_goes_on_with_a_warning(name, use):
    report = report_of(name)
    assert isinstance(report, CountReport)
    text = rf"{name} returns a \w+ and no longer a number: use len\(report\), or report.changed"
    with pytest.warns(DeprecationWarning, match=text) as caught:
        assert use(report, len(CHANGED[name]))
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("name", NUMBERS)
def test_truth_and_hash_warn_of_nothing(name):
    report = report_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report
        assert {report: 1}[report] == 1
        assert report == report
        assert report != report_of(name)
        with pytest.raises(TypeError):
            report + "text"


@pytest.mark.parametrize(
    ("name", "old"), [("convert_norms", "sites"), ("freeze_norms", "sites"), ("fold_norms", "folded")]
)
def test_old_names_go_on_with_a_warning(name, old):
    report = report_of(name)
    with pytest.warns(DeprecationWarning, match=rf"Report\.{old} is called \w+Report\.changed now") as caught:
        assert getattr(report, old) is report.changed
    assert {warning.filename for warning in caught} == {__file__}
    data = report.to_dict()
    with pytest.warns(DeprecationWarning, match=f"the key '{old}' is called 'changed' now") as caught:
        assert data[old] is data["changed"]
    with pytest.raises(KeyError, match="other"):
        data["other"]


def test_what_was_not_recognised_is_left():
    report = normzoo.convert_norms(model(), "group", exclude="4")
    assert list(report.not_recognised) == [site.name for site in report.left if not site.recognised]
    assert list(report.not_recognised) == ["8"]
    assert report.to_dict()["not_recognised"] == report.not_recognised


def test_freezing_says_why_each_norm_of_a_report_was_left():
    net = nn.Sequential(nn.BatchNorm2d(8), WithDropout(), nn.BatchNorm2d(8))
    report = normzoo.freeze_norms(net, exclude="2", recognise=True)
    assert [(site.name, site.why) for site in report.left][-1] == ("2", "exclude leaves it")
    assert [site.name for site in report.left if not site.recognised] == ["1"]


def test_layers_that_were_not_called_keep_their_statistics_and_are_named():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.used(x)

    report = normzoo.reestimate_statistics(Partly(), IMAGES)
    assert report.batches == 2
    assert [(site.name, site.why) for site in report.left] == [("unused", "it was not called in the forward pass")]
    assert report.changed[0].statistics == ["running_mean", "running_var"]
