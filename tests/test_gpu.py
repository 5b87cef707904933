"""On a real GPU: layers and measurements wait for nothing, figures are those of a CPU, graphs can be captured.

``make gpu`` runs what is marked ``gpu``; without a GPU it is left out, and tests/test_no_waits.py stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from callbacks_small import SmallNet, loader, trainer
from lightning.pytorch.strategies import DDPStrategy
from norm_cases import CASES, CHANNELS
from schemas import MEASUREMENTS
from torch import Tensor

from normzoo import load_run
from normzoo.callbacks import Divergence, GradientNoise, LossAbove
from normzoo.callbacks._run.ranks import Reading
from normzoo.testing import check_measurement, check_norm

pytestmark = pytest.mark.gpu
# Makers of measurements that record something in each of a few ordinary steps
MAKERS: dict[str, Callable[..., Any]] = {
    **MEASUREMENTS,
    "divergence": lambda *args, **options: Divergence(*args, rules=[LossAbove(1e-9)], **options),
    "gradient_noise": lambda *args, **options: GradientNoise(*args, split=2, **options),
}


@pytest.fixture(autouse=True)
def same_kernels() -> Iterator[None]:
    """Float32 products as on a CPU, and no search for the fastest kernel, which may differ from call to call."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[:2]
    torch.backends.cudnn.deterministic = before[2]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_keeps_its_promises_on_a_gpu(case: Any) -> None:
    check_norm(case.factory, checks=["no_host_sync"])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_computes_what_it_computes_on_a_cpu(case: Any, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    on_cpu, on_gpu = (case.factory(CHANNELS).to(dtype=torch.float64) for _ in range(2))
    on_gpu.load_state_dict(on_cpu.state_dict())
    on_gpu.cuda()
    x = torch.randn(4, CHANNELS, 6, 5, dtype=torch.float64)
    outputs = []
    for layer, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        own = x.to(device).contiguous(memory_format=memory_format).requires_grad_()
        y = layer(own)
        y.square().sum().backward()
        outputs.append([y, own.grad, *layer.state_dict().values(), *(p.grad for p in layer.parameters())])
    for a, b in zip(*outputs, strict=True):
        if a is not None:
            torch.testing.assert_close(b.cpu(), a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_with_a_layer_can_be_captured(case: Any) -> None:
    """Forward and backward, replayed from a CUDA graph, are those that are run one by one."""
    torch.manual_seed(0)
    layer = case.factory(CHANNELS).cuda()
    x = torch.randn(4, CHANNELS, 6, 5, device="cuda", requires_grad=True)

    def step() -> tuple[Tensor, Tensor]:
        y = layer(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        return y, grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    layer.load_state_dict(state)
    graph.replay()
    replayed = [t.clone() for t in captured] + [v.clone() for v in layer.state_dict().values()]
    layer.load_state_dict(state)
    expected = [*step(), *layer.state_dict().values()]
    for a, b in zip(replayed, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", MAKERS)
def test_a_measurement_keeps_its_promises_on_a_gpu(name: str) -> None:
    check_measurement(MAKERS[name], checks=["no_host_read", "zero_perturbation", "resume"])


def frames(folder: Path, name: str, **options: Any) -> pd.DataFrame:
    pl.seed_everything(1, verbose=False)
    callback = MAKERS[name](1)
    trainer(str(folder), callbacks=[callback], max_steps=6, **options).fit(SmallNet(), loader())
    return load_run(folder / "log")[name]


@pytest.mark.parametrize("name", MAKERS)
def test_one_rank_over_nccl_records_what_is_recorded_without(tmp_path: Path, name: str) -> None:
    alone = frames(tmp_path / "alone", name, accelerator="gpu", devices=1)
    strategy = DDPStrategy(process_group_backend="nccl")
    try:
        over_nccl = frames(tmp_path / "nccl", name, accelerator="gpu", devices=1, strategy=strategy)
        assert dist.get_backend() == "nccl"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert len(alone) > 0
    pd.testing.assert_frame_equal(alone, over_nccl, rtol=1e-5)


def test_values_come_to_the_host_by_pinned_copies() -> None:
    value = torch.arange(6.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        reading = Reading(value.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reading._value.is_pinned()
    assert reading.read().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_reading_is_of_the_values_as_they_were() -> None:
    value = torch.zeros(1 << 20, device="cuda")
    reading = Reading(value.clone())
    value += 1
    assert not reading.read().any()
