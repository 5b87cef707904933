"""What each tool that looks for torch's own layers does to each layer of the zoo, and that docs/layers.md says so."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from tool_cases import (
    AS_TORCH,
    BATCH,
    LAYERS,
    PLAIN,
    REST,
    TOOLS,
    WORDS,
    WRONG,
    layer_of,
)
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import normzoo

PAGE = Path(__file__).parents[1] / "docs" / "layers.md"
COLUMNS = (PLAIN, BATCH, REST)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated.*", "ignore:There is a performance drop", "ignore:.*FSDP.*", "ignore:.*NO_SHARD.*"
)


@functools.cache
def matrix(tool: str) -> dict[str, str]:
    """{layer: what the tool does to it}."""
    torch.manual_seed(0)
    return {label: TOOLS[tool](layer_of(label)) for label in LAYERS}


def documented() -> dict[str, dict[str, str]]:
    """{tool: {layer: word}} as the table in docs/layers.md has it.

    A cell is a word, for all layers of its column, and after semicolons other words with the layers that they are for.
    """
    found: dict[str, dict[str, str]] = {}
    section = (
        PAGE.read_text(encoding="utf-8").partition("## Tools that look for torch's own layers")[2].partition("\n## ")[0]
    )
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `"):
            continue
        tools, columns = re.findall(r"`([^`]+)`", cells[0]), cells[1:4]
        outcome: dict[str, str] = {}
        for labels, cell in zip(COLUMNS, columns, strict=True):
            default, *exceptions = cell.split("; ")
            outcome |= dict.fromkeys(labels, default)
            for exception in exceptions:
                word, _, names = exception.partition(": ")
                outcome |= dict.fromkeys(re.findall(r"`([^`]+)`", names), word)
        found |= dict.fromkeys(tools, outcome)
    return found


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_does_to_each_layer_what_the_docs_say(tool):
    assert matrix(tool) == documented()[tool]
    assert set(matrix(tool).values()) <= set(WORDS)


def test_the_docs_have_every_tool_and_layer():
    assert list(documented()) == list(TOOLS)
    assert {frozenset(row) for row in documented().values()} == {frozenset(LAYERS)}
    assert set(normzoo.list_norms()) <= set(LAYERS)


def test_only_fusers_are_wrong_and_only_plain_layers_are_converted():
    wrong = {(tool, label) for tool in TOOLS for label, word in matrix(tool).items() if word == WRONG}
    fusers = ("nn.utils.fuse_conv_bn_eval", "timm.utils.reparameterize_model")  # read attributes, of any layer
    assert {tool for tool, _ in wrong} == set(fusers)
    assert not any(label in PLAIN for _, label in wrong)
    for tool in TOOLS:
        if tool.endswith(("convert_sync_batchnorm", "sync_batchnorm=True)", "convert_splitbn_model")):
            assert {label for label, word in matrix(tool).items() if word == AS_TORCH} == PLAIN


class Net(pl.LightningModule):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), norm, nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - batch.prod(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_fit_with_weight_averaging_is_that_of_torchs_layer():
    states = []
    for norm in (nn.BatchNorm1d, functools.partial(normzoo.create_norm, "batch")):
        pl.seed_everything(0, verbose=False)
        model, data = Net(norm(8)), torch.randn(32, 4, generator=torch.Generator().manual_seed(1)) + 1
        trainer = pl.Trainer(
            max_epochs=3,
            accelerator="cpu",
            callbacks=[StochasticWeightAveraging(0.05, swa_epoch_start=1)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(data, batch_size=8))
        states.append(model.state_dict())
    assert_close(states[0], states[1])
    assert states[0]["net.1.num_batches_tracked"] == 4  # of the pass after averaging


@pytest.mark.parametrize("label", ["batch_renorm", "batch with act_layer", "switchable"])
def test_what_the_docs_advise_does_what_a_tool_does_not(label):
    name, options = LAYERS[label]
    model, data = nn.Sequential(nn.Conv2d(8, 8, 1), layer_of(label)), [torch.randn(6, 8, 4, 4) for _ in range(3)]
    held = model[1].running_mean.clone()
    torch.optim.swa_utils.update_bn(data, model)
    assert torch.equal(model[1].running_mean, held)
    assert len(normzoo.reestimate_statistics(model, data)) == 1
    assert not torch.equal(model[1].running_mean, held)
    assert normzoo.create_norm(name, 8, **{**options, "sync": True}).sync
    expected = model.eval()(data[0])
    report = normzoo.fold_norms(model, data[0])
    assert_close(model(data[0]), expected, rtol=1e-4, atol=1e-5)
    assert report is not None
