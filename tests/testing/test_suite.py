"""What the suite returns, raises and refuses."""

from __future__ import annotations

import functools
import importlib.util
import re
import unittest
from pathlib import Path

import pytest
import torch
from torch import nn

import normzoo
from normzoo import registry
from normzoo.testing import CHECKS, CheckResult, NormCheckError, Subject, check_norm, norm_checks

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
GroupNorm = normzoo.norm_info("group").layer_class
QUICK = ["signature", "ranks", "input_kept"]


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_NORMS", dict(registry._NORMS))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))
    monkeypatch.setattr(registry, "_BY_TARGET", dict(registry._BY_TARGET))


def two(num_features, *, groups=2, device=None, dtype=None):
    return GroupNorm(num_features, groups=groups, device=device, dtype=dtype)


@pytest.mark.parametrize(
    "factory",
    [
        "group",
        "GroupNorm",
        normzoo.get_norm("group", groups=2),
        functools.partial(functools.partial(GroupNorm, groups=3), eps=1e-3),
        two,
        normzoo.norm_info("layer").layer_class,
    ],
    ids=["name", "alias", "get_norm", "partial", "function", "class"],
)
def test_what_can_be_checked(factory):
    results = check_norm(factory, checks=QUICK)
    assert results == [CheckResult(name, "passed") for name in QUICK]


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("group", "GroupNorm(6, groups=2)"),
        (normzoo.get_norm("group", groups=3, eps=0.1), "GroupNorm(6, groups=3, eps=0.1)"),
        (two, "two(6)"),
    ],
)
def test_the_layer_is_named_as_it_is_made(factory, text):
    assert str(Subject(factory)) == text


@pytest.mark.parametrize(("channels", "groups"), [(6, 2), (9, 3), (5, 5), (64, 32)])
def test_a_default_number_of_groups_that_does_not_divide_the_channels_is_replaced(channels, groups):
    assert Subject("group", channels).make().groups == groups


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_a_layer_of_channels_last_is_checked_at_all_ranks(channel_dim):
    subject = Subject(normzoo.get_norm("layer", channel_dim=channel_dim))
    assert sorted(map(len, subject.shapes)) == [2, 3, 4, 5]
    assert subject.make().channel_dim == 1
    assert subject.make(channel_dim=-1).channel_dim == -1


def test_every_check_states_its_promise_in_one_line():
    assert len(CHECKS) == 38
    for name, check in CHECKS.items():
        assert check.__doc__ is not None, name
        assert "\n" not in check.__doc__, name
        assert check.__doc__.endswith("."), name
        assert check.__name__ == name
    assert [name for name, check in CHECKS.items() if check.slow] == ["compile", "export", "export_dynamic", "onnx"]


def test_the_docs_list_every_promise_and_every_exception():
    text = PAGE.read_text(encoding="utf-8").split("\n## Measurements\n")[0]
    promises = [f"| `{n}`{' (slow)' if c.slow else ''} | {c.__doc__} |" for n, c in CHECKS.items()]
    infos = map(normzoo.norm_info, normzoo.list_norms())
    exceptions = [f"| `{i.name}` | `{n}` | {why} |" for i in infos for n, why in i.exceptions.items()]
    assert sorted(line for line in text.splitlines() if line.startswith("| `")) == sorted([*promises, *exceptions])


def test_all_checks_are_run_by_default(monkeypatch):
    ran = []
    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, lambda subject, name=name: ran.append(name))
    results = check_norm("layer")
    assert ran == list(CHECKS) == [result.name for result in results]
    assert {result.status for result in results} == {"passed"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"checks": ["gradchek"]}, "'gradchek' is not a known check; did you mean 'gradcheck'"),
        ({"exceptions": {"exprt": "why"}}, "'exprt' is not a known check; did you mean 'export'"),
        ({"num_features": 1}, "num_features must be at least 2, for channels to differ, not 1"),
    ],
)
@pytest.mark.parametrize("function", [check_norm, norm_checks])
def test_bad_arguments_are_refused_at_once(function, arguments, text):
    with pytest.raises(ValueError, match=text):
        function("layer", **arguments)


def test_what_is_no_factory_is_refused():
    with pytest.raises(ValueError, match="'gruop' is not a known norm; did you mean 'group'"):
        check_norm("gruop")
    with pytest.raises(ValueError, match="changes the weights of convolutions"):
        check_norm("scaled_ws")
    for given in (6, GroupNorm(6, groups=2)):
        with pytest.raises(TypeError, match="factory must be a registered name, a class or a function, not "):
            check_norm(given)


class Shouting(nn.Module):
    """Gives what is twice as large and not even the input's shape."""

    def __init__(self, num_features, *, device=None, dtype=None):
        super().__init__()

    def forward(self, x):
        return x[:1].double() * 2


def test_one_error_lists_every_broken_promise_with_its_numbers():
    with pytest.raises(NormCheckError) as caught:
        check_norm(Shouting, checks=["signature", "momentum_none", "ranks", "input_kept", "copies"])
    assert isinstance(caught.value, AssertionError)
    text = str(caught.value)
    head, *blocks = text.split("\n\n")
    assert head == "Shouting(6) breaks 3 promises (1 passed, 1 skipped):"
    assert [block.split(":")[0].strip() for block in blocks] == ["ranks", "input_kept", "copies"]
    for name, block in zip(["ranks", "input_kept", "copies"], blocks, strict=True):
        assert CHECKS[name].__doc__ in block
    assert "training, input (5, 6) float32: the output is (1, 6) float64" in text


def test_numbers_tell_what_came_out_and_what_was_expected():
    layer = normzoo.norm_info("layer").layer_class
    with pytest.raises(NormCheckError) as caught:
        check_norm(layer, reference=lambda layer, x: x * 0 + 3, checks=["reference"])
    pattern = (
        r"training, input \(3, 6, 4, 3\) float64, step 0: output: largest difference \d\.\d+, allowed 3e-10; "
        r"at \(\d, \d, \d, \d\) -?\d\.\d+ came out, 3 was expected \(\(3, 6, 4, 3\) float64\)"
    )
    assert re.search(pattern, str(caught.value))


def test_what_does_not_apply_is_skipped_with_the_reason():
    checks = ["reference", "running_statistics", "momentum_none", "sync", "channel_dim", "affine_false"]
    results = check_norm(Shouting, checks=checks)
    assert [(r.status, r.detail) for r in results] == [
        ("skipped", "no reference was given"),
        ("skipped", "it has no running statistics"),
        ("skipped", "it has no running statistics"),
        ("skipped", "it has no option 'sync'"),
        ("skipped", "it has no option 'channel_dim'"),
        ("skipped", "it has no option 'affine'"),
    ]


def test_a_missing_exporter_is_a_reason_to_skip(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else find(name))
    (result,) = check_norm("layer", checks=["onnx"])
    assert (result.status, result.detail) == ("skipped", "onnxscript not installed")


def test_declared_exceptions_are_honoured():
    results = check_norm(Shouting, checks=["ranks", "signature"], exceptions={"ranks": "it shouts"})
    assert [(r.name, r.status) for r in results] == [("ranks", "excepted"), ("signature", "passed")]
    assert results[0].detail.startswith("it shouts (training, input (5, 6) float32: the output is (1, 6) float64")


def test_a_wrong_declaration_is_caught():
    with pytest.raises(NormCheckError, match="keeps it, although it is declared an exception: 'so they say'"):
        check_norm("layer", checks=QUICK, exceptions={"ranks": "so they say"})


def test_so_is_one_of_any_check():
    fast = [name for name, check in CHECKS.items() if not check.slow and name != "sync"]
    kept = [result.name for result in check_norm("batch", checks=fast) if result.status == "passed"]
    assert len(kept) > 20
    with pytest.raises(NormCheckError) as caught:
        check_norm("batch", checks=kept, exceptions=dict.fromkeys(kept, "so they say"))
    assert str(caught.value).startswith(f"BatchNorm(6) breaks {len(kept)} promises (none passed):")


def test_a_declared_exception_that_does_not_apply_is_skipped():
    (result,) = check_norm(Shouting, checks=["sync"], exceptions={"sync": "it has no statistics"})
    assert result.status == "skipped"


def test_the_registry_declares_for_names_and_for_its_classes(own_registry):
    normzoo.register_norm("shouting", family="own", exceptions={"ranks": "it shouts"})(Shouting)
    for factory in ("shouting", Shouting, normzoo.get_norm("shouting")):
        assert check_norm(factory, checks=["ranks"])[0].status == "excepted"
        with pytest.raises(NormCheckError, match="the output is"):
            check_norm(factory, checks=["ranks"], exceptions={})


def test_batch_statistics_come_from_the_registry_or_the_argument(own_registry):
    assert Subject("batch").batch_statistics is True
    assert Subject(type(normzoo.create_norm("batch", 4))).batch_statistics is True
    assert Subject(normzoo.get_norm("group", groups=2)).batch_statistics is False
    assert Subject(Shouting).batch_statistics is None
    assert Subject("batch", batch_statistics=False).batch_statistics is False


def test_one_by_one_for_a_test_runner():
    checks = dict(norm_checks(Shouting, checks=["signature", "ranks", "sync"]))
    assert [check.__name__ for check in checks.values()] == list(checks) == ["signature", "ranks", "sync"]
    assert checks["signature"]() == CheckResult("signature", "passed")
    with pytest.raises(NormCheckError, match=r"^Shouting\(6\) breaks a promise:\n\n  ranks: "):
        checks["ranks"]()
    with pytest.raises(unittest.SkipTest, match=r"^Shouting\(6\): it has no option 'sync'$"):
        checks["sync"]()


def test_the_runner_is_left_as_it_was():
    torch.manual_seed(3)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        check_norm("layer", checks=[name for name, check in CHECKS.items() if not check.slow])
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("num_features", [2, 16])
def test_the_number_of_channels_is_free(num_features):
    fast = [name for name, check in CHECKS.items() if not check.slow and name != "sync"]
    for layer in ("batch", "layer"):
        check_norm(layer, num_features=num_features, checks=fast)
