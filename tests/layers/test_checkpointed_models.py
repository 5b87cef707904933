"""Activation checkpoints as models use them: timm's, Lightning's, compiled ones, and those of several ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from norm_cases import sample
from ranks import run_ranks
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normzoo

OPEN = {"name": "batch_renorm", "r_max": 3.0, "d_max": 5.0}
NORMS = [OPEN, {"name": "power", "warmup": 0}, {"name": "online"}, {"name": "batch"}]
# The compiler takes seconds.
SOME_SLOW = [
    pytest.param(norm, reentrant, id=f"{norm['name']}-{how}", marks=[pytest.mark.slow] if reentrant or i else [])
    for i, norm in enumerate(NORMS)
    for how, reentrant in (("by-hooks", False), ("reentrant", True))
]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm["name"])


def assert_equal_after(model: nn.Module, twin: nn.Module, tolerance: float = 1e-5) -> None:
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@every_norm
def test_set_grad_checkpointing_of_timm(norm):
    torch.manual_seed(0)
    model = normzoo.create_model("test_resnet", norm, num_classes=3).double().train()
    twin = copy.deepcopy(model)
    model.set_grad_checkpointing()
    for seed in range(2):
        x = sample((4, 3, 32, 32), seed=seed)
        for m in (model, twin):
            m.zero_grad()
            m(x).square().sum().backward()
    assert_equal_after(model, twin, 1e-7)


class Regression(LightningModule):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        norms = [normzoo.create_norm(n.pop("name"), 4, **n) for n in map(dict, (OPEN, *NORMS[1:]))]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), norm, nn.Tanh()) for norm in norms)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = batch.requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x.square().mean() + x.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_trains_to_the_same_weights():
    models = [Regression(True), Regression(False)]
    for model in models:
        data = torch.utils.data.DataLoader(sample((32, 4), torch.float32), batch_size=8)
        Trainer(
            max_epochs=1,
            accumulate_grad_batches=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        ).fit(model, data)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


class Checkpointed(nn.Module):
    def __init__(self, blocks: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.blocks, self.reentrant = blocks, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def network(norm: dict) -> nn.Sequential:
    torch.manual_seed(0)
    options = {k: v for k, v in norm.items() if k != "name"}
    norms = [normzoo.create_norm(norm["name"], 6, **options) for _ in range(2)]
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), norm, nn.Tanh()) for norm in norms))


def two_steps(twin: nn.Module, model: nn.Module) -> None:
    for seed in range(2):
        for m in (twin, model):
            m.zero_grad()
            x = sample((8, 6), torch.float32, seed=seed).requires_grad_()
            m(x).square().sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo, where a graph breaks
@pytest.mark.parametrize(("norm", "reentrant"), SOME_SLOW)
def test_a_compiled_model_with_checkpoints_in_it(norm, reentrant):
    torch._dynamo.reset()
    blocks = network(norm)
    twin = copy.deepcopy(blocks)
    model = torch.compile(Checkpointed(blocks, reentrant), backend="aot_eager")
    if norm is OPEN and torch.__version__ < "2.15":  # older compilers save the token of an effect
        with pytest.raises(AssertionError, match="expected all tensors_saved_with_vc_check to be Tensors"):
            two_steps(twin, model)
        return
    two_steps(twin, model)
    assert_equal_after(blocks, twin)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("norm", "reentrant"), [case for case in SOME_SLOW if case.values[0]["name"] != "batch"])
def test_checkpoints_of_compiled_blocks(norm, reentrant):
    """What reads its statistics computes the right gradients, or says that it cannot."""
    torch._dynamo.reset()
    blocks = network(norm)
    twin = copy.deepcopy(blocks)
    for block in blocks:
        block.compile(backend="aot_eager")
    model = Checkpointed(blocks, reentrant)
    if norm is OPEN:
        with pytest.raises(RuntimeError, match="cannot be recomputed by an activation checkpoint outside of torch"):
            two_steps(twin, model)
        return
    two_steps(twin, model)
    counts = [name for name, _ in blocks.named_buffers() if name.endswith("num_batches_tracked")]
    for a, b in zip((blocks.get_buffer(n) for n in counts), (twin.get_buffer(n) for n in counts), strict=True):
        b.copy_(a)  # compiled code counts what is recomputed
    assert_equal_after(blocks, twin)


RANKS = """
import os, sys
sys.path.insert(0, os.environ["TESTS"])
import torch
import torch.distributed as dist
from norm_cases import sample
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
import normzoo

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
OPTIONS = {"batch": {}, "batch_renorm": {"r_max": 3.0, "d_max": 5.0}, "power": {"warmup": 0}, "evonorm_b0": {}}
for name, options in OPTIONS.items():
    for reentrant in (False, True):
        found = []
        for on in (True, False):
            torch.manual_seed(0)
            norms = [normzoo.create_norm(name, 6, sync=True, dtype=torch.float64, **options) for _ in range(2)]
            linear = [nn.Linear(6, 6, dtype=torch.float64) for _ in range(2)]
            net = nn.Sequential(linear[0], norms[0], nn.Tanh(), linear[1], norms[1], nn.Tanh())
            class Region(nn.Module):
                def __init__(self, net):
                    super().__init__()
                    self.net = net
                def forward(self, x):
                    return checkpoint(self.net, x, use_reentrant=reentrant) if on else self.net(x)
            model = DistributedDataParallel(Region(net), broadcast_buffers=False)
            for step in range(3):
                size = 5 + 2 * rank
                x = (sample((size, 6), seed=10 * step + rank) + rank).requires_grad_()
                model.zero_grad()
                y = model(x)
                (y * sample((size, 6), seed=50 + step)).sum().backward()
            found.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name} {reentrant}: {text}")
dist.barrier()
dist.destroy_process_group()
"""


def test_statistics_over_ranks_in_recomputations(tmp_path):
    """Collectives in recomputations match on ranks with batches of different sizes."""
    run_ranks(tmp_path, RANKS, 2)
