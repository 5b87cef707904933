"""``normzoo convert``: a file converted is what the converted model loads, and computes the same with."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sweeps import cells, few, slow
from torch import nn
from torch.testing import assert_close

import normzoo
from normzoo.cli.main import main
from normzoo.convert._state_dict import convert_state_dict
from normzoo.data._loader import BatchLoader
from normzoo.recognition import norm_entries
from normzoo.task import ImageClassification

TARGETS: list[tuple[str, dict[str, Any]]] = [
    ("group", {"groups": 8}),
    ("batch_renorm", {}),
    ("layer_channel", {}),
    ("rms", {}),
    ("none", {}),
    ("switchable", {}),
    ("iter_norm", {"groups": 4}),
    ("dynamic_tanh", {}),
    ("local_response", {}),
    ("batch", {"affine": False}),
    ("filter_response", {"act_layer": None}),
    ("group+ws", {}),
    ("scaled_ws", {}),
]
# With running statistics, of weights as well, and on a network like a transformer
FAST = {
    "test_resnet": ("batch_renorm", "group+ws"),
    "convnext_atto": ("layer_channel",),
}
STANDS_FOR = {
    "efficientnet_b0": "group",
    "resmlp_12_224": "batch_renorm",
    "vit_tiny_patch16_224": "rms",
    "mobilenetv3_small_050": "batch_instance",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model_of(name: str, **options: Any) -> nn.Module:
    """A model none of whose entries are as at the start."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
        elif key.endswith("num_batches_tracked"):
            tensor.fill_(7)
    return model.eval()


def image(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def loads_and_computes_the_same(
    state: dict[str, Any], name: str, to: str, options: dict[str, Any], **more: Any
) -> None:
    """``convert_norms`` on the loaded model, and the converted file in a converted model of other weights."""
    want = model_of(name, **more)
    normzoo.convert_norms(want, to, options=options)
    fresh = timm.create_model(name, num_classes=5, **more).eval()
    normzoo.convert_norms(fresh, to, options=options)
    fresh.load_state_dict(state, strict=True)
    assert list(state) == list(want.state_dict()) or to == "scaled_ws"
    # what convert_norms folds into the whitening by the layers' eps, a file does not tell
    told = {k for k in want.state_dict() if not k.endswith("running_whitening") or name == "convnext_atto"}
    values = [{k: v for k, v in model.state_dict().items() if k in told} for model in (fresh, want)]
    assert_close(*values, rtol=0, atol=0)
    if told == want.state_dict().keys():
        with torch.no_grad():
            assert_close(fresh(image()), want(image()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "to", "options"),
    [
        (pytest.param if to in fast else slow)(name, to, options, id=f"{name}-{to}-{'-'.join(options)}")
        for name, fast in FAST.items()
        for to, options in TARGETS
    ],
)
def test_a_state_dict_is_what_the_converted_model_loads(name: str, to: str, options: dict[str, Any]) -> None:
    if name == "convnext_atto" and to in ("group+ws", "scaled_ws"):
        options = {}
    state = model_of(name).state_dict()
    made = convert_state_dict(state, to, options=options)
    assert made.state._metadata == state._metadata  # by which modules load the states of their earlier versions
    loads_and_computes_the_same(made.state, name, to, options)
    model = model_of(name)
    assert [s.name for s in made.report.changed] == [
        s.name for s in normzoo.convert_norms(model, to, options=options).changed
    ]


@pytest.mark.parametrize(
    ("name", "to"),
    cells([*STANDS_FOR, "resnetv2_50", "regnetx_002"], STANDS_FOR.values(), fast=STANDS_FOR.items()),
)
def test_names_are_enough_for_fused_layers_transformers_and_affine(name: str, to: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    made = convert_state_dict(model.state_dict(), to)
    report = normzoo.convert_norms(model, to)
    # an affine layer's identity is a variance of 1 - eps
    eps = 1.1e-5 if name == "resmlp_12_224" else 0
    assert_close(dict(made.state), dict(model.state_dict()), rtol=0, atol=eps)
    for ours, theirs in zip(made.report.changed, report.changed, strict=True):
        assert (ours.name, ours.channels, ours.carried, ours.created) == (
            theirs.name,
            theirs.channels,
            theirs.carried,
            theirs.created,
        )


@pytest.mark.parametrize(
    "source", few(["switchable", "dynamic_tanh", "evonorm_b0", "filter_response", "rms", "online"], "switchable")
)
def test_layers_of_the_zoo_are_sources(source: str) -> None:
    model = normzoo.create_model("efficientnet_b0", source, num_classes=5)
    made = convert_state_dict(model.state_dict(), "batch")
    normzoo.convert_norms(model, "batch")
    assert_close(dict(made.state), dict(model.state_dict()), rtol=0, atol=0)


def test_parts_of_split_batch_norm_go_and_activations_with_weights_stay() -> None:
    split = timm.layers.convert_splitbn_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 2)
    fused = timm.create_model("efficientnet_lite0", act_layer=nn.PReLU, num_classes=5)
    for model in (split, fused):
        made = convert_state_dict(model.state_dict(), "group")
        normzoo.convert_norms(model, "group")
        assert_close(dict(made.state), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({"a.weight": torch.ones(4)}, ["a"]),
        ({"a.weight": torch.ones(1)}, []),
        ({"a.weight": torch.ones(1), "a.bias": torch.ones(1)}, ["a"]),
        ({"a.weight": torch.ones(4, 4), "a.bias": torch.ones(4)}, []),
        ({"a.weight": torch.ones(4), "a.bias": torch.ones(3)}, []),
        ({"a.bias": torch.ones(4)}, []),
        ({"a.running_mean": torch.ones(4), "a.running_var": torch.ones(4)}, ["a"]),
        ({"a.weight": torch.ones(4), "a.table": torch.ones(4)}, []),
        ({"a.weight": torch.ones(4, dtype=torch.long)}, []),
        ({"blocks.0.ls1.gamma": torch.ones(4)}, []),
        ({"a.alpha": torch.ones(1, 1, 4), "a.beta": torch.ones(1, 1, 4)}, ["a"]),
        ({"a.alpha": torch.ones(1), "a.beta": torch.ones(1)}, []),
        ({"weight": torch.ones(4), "bias": torch.ones(4)}, []),
        ({"a.weight": torch.ones(4), "a._extra_state": {"x": 1}}, []),
    ],
)
def test_what_is_taken_for_a_norm_layer(entries: dict[str, Any], found: list[str]) -> None:
    assert list(norm_entries(entries)) == found


def test_made_without_scale_and_shift() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))
    made = convert_state_dict(model.state_dict(), "batch_renorm")
    normzoo.convert_norms(model, "batch_renorm")
    assert list(made.state) == list(model.state_dict())
    assert not made.parameters_changed


def test_dtype_stays_and_the_file_read_is_not_changed() -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)).double().state_dict()
    before = OrderedDict(state)
    made = convert_state_dict(state, "batch")
    assert {t.dtype for t in made.state.values() if t.is_floating_point()} == {torch.float64}
    assert list(state) == list(before)
    assert made.state["1.weight"].data_ptr() == state["1.weight"].data_ptr()


def loaders() -> tuple[BatchLoader, BatchLoader]:
    images = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8)
    train, test = (
        BatchLoader(images, torch.arange(8) % 3, 4, mean=(0.5,), std=(0.3,), shuffle=s) for s in (True, False)
    )
    return train, test


def fitted() -> Path:
    """The checkpoint of a fit of one epoch."""
    torch.manual_seed(0)
    task = ImageClassification("resnet20_cifar", "batch", num_classes=3, in_chans=1)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [pl.callbacks.ModelCheckpoint(dirpath=".", filename="fit")]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet)
    trainer.fit(task, *loaders())
    return Path("fit.ckpt")


def test_a_lightning_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    path = fitted()
    held = torch.load(path, weights_only=True)
    batch = ImageClassification.load_from_checkpoint(path, norm="batch", num_classes=3, in_chans=1).eval()
    x = torch.randn(2, 1, 16, 16)
    for to, dropped in (("group", False), ("batch_renorm", False), ("none", True), ("batch_instance", True)):
        out = Path(f"{to}.ckpt")
        assert main(["convert", str(path), "--to", to, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert f"19 norm layers converted to {to}" in printed
        assert printed.rstrip().endswith(f"wrote {out}")
        assert ("dropped, as the parameters are others now: optimizer_states, lr_schedulers" in printed) is dropped
        made = torch.load(out, weights_only=True)
        gone = {"optimizer_states", "lr_schedulers", "loops", "callbacks"} if dropped else set()
        assert made.keys() == held.keys() - gone
        assert (made["epoch"], made["global_step"]) == (held["epoch"], held["global_step"])
        task = ImageClassification.load_from_checkpoint(out, norm=to, num_classes=3, in_chans=1).eval()
        want = ImageClassification.load_from_checkpoint(path, norm="batch", num_classes=3, in_chans=1).eval()
        normzoo.convert_norms(want, to)
        with torch.no_grad():
            assert_close(task(x), want(x), rtol=0, atol=0)
    assert len(norm_entries(batch.state_dict())) == 19


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, that the callbacks are others
def test_training_goes_on_from_a_converted_checkpoint_whose_parameters_are_the_same() -> None:
    assert main(["convert", str(fitted()), "--to", "group", "--out", "new.ckpt"]) == 0
    task = ImageClassification("resnet20_cifar", "group", num_classes=3, in_chans=1)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, **quiet)
    trainer.fit(task, *loaders(), ckpt_path="new.ckpt", weights_only=True)
    assert trainer.global_step == 4


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_files_of_state_dicts(key: str | None) -> None:
    state = model_of("test_resnet").state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3}, "old.pth")
    assert main(["convert", "old.pth", "--to=group", "--out=new.pth", "--options={groups: 8, eps: 1e-3}"]) == 0
    made = torch.load("new.pth", weights_only=True)
    assert key is None or made["epoch"] == 3
    loads_and_computes_the_same(made if key is None else made[key], "test_resnet", "group", {"groups": 8, "eps": 1e-3})


def test_copies_are_converted_alike() -> None:
    state = model_of("test_resnet").state_dict()
    averaged = {k: v.clone() * 2 if v.is_floating_point() else v for k, v in state.items()}
    torch.save(
        {"state_dict": state, "state_dict_ema": averaged, "optimizer": {"state": {}}, "arch": "test_resnet"}, "o.pt"
    )
    assert main(["convert", "o.pt", "--to", "none", "--out", "n.pt"]) == 0
    made = torch.load("n.pt", weights_only=True)
    assert made.keys() == {"state_dict", "state_dict_ema", "arch"}
    assert made["state_dict"].keys() == made["state_dict_ema"].keys()
    assert_close(made["state_dict_ema"]["bn1.bias"], 2 * made["state_dict"]["bn1.bias"])


def test_safetensors() -> None:
    save_file(model_of("test_resnet").state_dict(), "old.safetensors", {"format": "pt", "note": "mine"})
    assert main(["convert", "old.safetensors", "--to", "batch_renorm", "--out", "new.safetensors"]) == 0
    made = load_file("new.safetensors")
    fresh = normzoo.create_model("test_resnet", "batch_renorm", num_classes=5)
    fresh.load_state_dict(made, strict=True)
    with normzoo.cli.checkpoint_file.safetensors_package(Path()).safe_open("new.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "mine"}
    assert main(["convert", "old.safetensors", "--to", "group", "--out", "new.pt"]) == 0
    assert torch.load("new.pt", weights_only=True).keys() == convert_state_dict(made, "group").state.keys()


def test_layers_left_out() -> None:
    torch.save(model_of("test_resnet").state_dict(), "old.pt")
    command = ["convert", "old.pt", "--to", "group", "--out", "new.pt", "--exclude", "layer*", "--exclude", "x"]
    assert main(command) == 0
    made = torch.load("new.pt", weights_only=True)
    assert "bn1.running_mean" not in made
    assert "layer1.0.bn1.running_mean" in made


class WritesAFile:
    def __reduce__(self) -> Any:
        return (os.system, ("touch appeared",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("raw", [True, False])
def test_what_would_run_code_is_refused(zipped: bool, raw: bool, folder: Path, capsys: Any) -> None:
    content = {"state_dict": model_of("test_resnet").state_dict(), "more": WritesAFile()}
    if raw:
        Path("bad.ckpt").write_bytes(pickle.dumps({"more": WritesAFile()}))
    else:
        torch.save(content, "bad.ckpt", _use_new_zipfile_serialization=zipped)
    assert main(["convert", "bad.ckpt", "--to", "group", "--out", "new.ckpt"]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    told = " cannot be read: it is cut short, damaged, or a pickle" if raw else ": holds posix.system, and reading more"
    assert f"bad.ckpt{told}" in error
    assert [p.name for p in folder.iterdir()] == ["bad.ckpt"]


CASES = {
    "file": (["none.pt", "--to", "group", "--out", "o.pt"], ["none.pt: no such file"]),
    "a folder": (["sub", "--to", "group", "--out", "o.pt"], ["sub: is a folder"]),
    "norm": (["old.pt", "--to", "gruop", "--out", "o.pt"], ["'gruop' is not a known norm", "'group'"]),
    "option": (["old.pt", "--to", "group", "--out", "o.pt", "--options", "{grops: 2}"], ["'grops'", "'groups'"]),
    "options": (["old.pt", "--to", "group", "--out", "o.pt", "--options", "8"], ["--options", "a mapping", "8"]),
    "options yaml": (["old.pt", "--to", "group", "--out", "o.pt", "--options", "{"], ["--options", "not valid YAML"]),
    "option value": (
        ["old.pt", "--to", "batch_renorm", "--out", "o.pt", "--options={r_max: 0}"],
        ["1 (4 channels) cannot become batch_renorm: r_max must be at least 1"],
    ),
    "option type": (
        ["old.pt", "--to", "group", "--out", "o.pt", "--options={act_layer: relu}"],
        ["1 (4 channels) cannot become group"],
    ),
    "own activation": (
        ["old.pt", "--to", "evonorm_s0", "--out", "o.pt"],
        ["an activation of its own", "convert_norms"],
    ),
    "out exists": (["old.pt", "--to", "group", "--out", "plain.pt"], ["plain.pt exists", "--force"]),
    "out is the input": (["old.pt", "--to", "group", "--out", "sub/../old.pt", "--force"], ["the checkpoint itself"]),
    "out is a folder": (["old.pt", "--to", "group", "--out", "sub", "--force"], ["sub is a folder"]),
    "out in no folder": (["old.pt", "--to", "group", "--out", "no/o.pt"], ["cannot write no/o.pt", "No such file"]),
    "out in a file": (["old.pt", "--to", "group", "--out", "old.pt/o.pt"], ["cannot write old.pt/o.pt", "Not a dir"]),
    "no norms": (["plain.pt", "--to", "group", "--out", "o.pt"], ["plain.pt: there is no norm layer"]),
    "none chosen": (["old.pt", "--to", "group", "--out", "o.pt", "--exclude", "*"], ["there is no norm layer"]),
    "no state dict": (["epoch.pt", "--to", "group", "--out", "o.pt"], ["holds no state dict", "'epoch'"]),
    "a tensor": (["tensor.pt", "--to", "group", "--out", "o.pt"], ["holds a Tensor, not a state dict"]),
    "text": (["text.pt", "--to", "group", "--out", "o.pt"], ["text.pt is a text file; expected a checkpoint"]),
    "more than safetensors hold": (
        ["more.pt", "--to", "group", "--out", "o.safetensors"],
        ["o.safetensors: safetensors holds tensors alone"],
    ),
    "arguments of a script": (["args.pt", "--to", "group", "--out", "o.pt"], ["holds argparse.Namespace"]),
    "no convolutions": (["linear.pt", "--to", "group+ws", "--out", "o.pt"], ["linear.pt: there are no convolutions"]),
    "standardized already": (["scaled.pt", "--to", "group+ws", "--out", "o.pt"], ["'0' are standardized already"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()
    linear = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).state_dict()
    contents = {
        "old": state,
        "plain": nn.Sequential(nn.Linear(2, 2)).state_dict(),
        "epoch": {"epoch": 3},
        "tensor": torch.zeros(3),
        "more": {"state_dict": state, "epoch": 3},
        "args": {"state_dict": state, "args": argparse.Namespace(lr=1)},
        "linear": linear,
        "scaled": {**state, "0.gain": torch.ones(4)},
    }
    for name, content in contents.items():
        torch.save(content, f"{name}.pt")
    Path("text.pt").write_text("not a checkpoint")
    Path("sub").mkdir()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    arguments, expected = CASES[case]
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    for part in expected:
        assert part in error
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_force_overwrites_and_nothing_is_left_beside(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict(), "old.pt")
    Path("new.pt").write_text("before")
    assert main(["convert", "old.pt", "--to", "group", "--out", "new.pt", "--force"]) == 0
    assert list(torch.load("new.pt", weights_only=True)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert sorted(p.name for p in folder.iterdir()) == ["new.pt", "old.pt"]


@pytest.mark.parametrize(
    ("state", "to", "text"),
    [
        ({"a.weight": torch.ones(4)}, "layer", "a weight alone may as well be that of a PReLU"),
        ({"a.weight": torch.ones(4), "a.bias": torch.ones(4)}, "iter_norm", "depends on groups"),
        ({"a.weight": torch.ones(4), "a.bias": torch.ones(4)}, "batch", "running statistics start anew"),
    ],
)
def test_what_names_do_not_tell_is_said(state: dict[str, Any], to: str, text: str, capsys: Any) -> None:
    torch.save(state, "old.pt")
    assert main(["convert", "old.pt", "--to", to, "--out", "new.pt"]) == 0
    printed = capsys.readouterr().out
    assert text in printed
    assert "not seen, as a file holds tensors only" in printed


def test_the_response_norm_of_convnext_v2_is_no_norm_layer():
    model = timm.create_model("convnextv2_atto", num_classes=3)
    converted = convert_state_dict(model.state_dict(), "dynamic_tanh")
    report = normzoo.convert_norms(model, "dynamic_tanh")
    assert len(converted.report) == len(report)
    model.load_state_dict(converted.state)
    assert converted.report.changed[0].warnings == []
