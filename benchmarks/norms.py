"""Time and memory of every layer, as multiples of torch.nn.BatchNorm2d in the same run.

usage: python benchmarks/norms.py [--rounds 20] [--threads 2] [--only NAME ...] [--no-compiled] [--device cuda]
                                   [--write]

Every layer's forward and backward run beside nn.BatchNorm2d, the same layer of timm or torch, and the layer's own
formula through autograd, one after the other in each round, on four shapes in two memory formats; a ratio is that of
the medians over rounds. Each layer, with what it is compared with, has a process of its own, so that no figure depends
on which layers were measured before. ``--write`` makes docs/benchmarks/norms.md, its figure, and
normzoo/layer_costs.json, from which ``normzoo list norms`` takes its last column. On ``--device cuda`` all layers are
measured in one process, the clock is read when the GPU has done its work, and nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm.layers as tl
import torch
from _norms_floor import counts, floor, kernels
from torch import Tensor, nn

import normzoo
from normzoo.functional._pieces import whole_formulas

ROOT = Path(__file__).parents[1]
SHAPES = [(128, 16, 32, 32), (128, 64, 8, 8), (32, 64, 56, 56), (32, 256, 14, 14)]
COMPILED_SHAPE = (32, 256, 14, 14)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OPTIONS: dict[str, dict[str, Any]] = {
    "group": {"groups": 8},
    "batch_group": {"groups": 8},
    "evonorm_s0": {"groups": 8},
    "ghost_batch": {"ghost_size": 16},
    # bounds at which it corrects; by default the first 5,000 steps are batch norm
    "batch_renorm": {"r_max": 3.0, "d_max": 5.0},
}
# Layers with other options, under names of their own.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"power-groups": ("power", {"groups": 8})}
PEERS: dict[str, Callable[[int], nn.Module]] = {
    "batch": lambda c: tl.BatchNormAct2d(c, apply_act=False),
    "evonorm_b0": tl.EvoNorm2dB0,
    "evonorm_s0": lambda c: tl.EvoNorm2dS0(c, groups=8),
    "filter_response": tl.FilterResponseNormTlu2d,
    "frozen_batch": lambda c: tl.FrozenBatchNormAct2d(c, apply_act=False),
    "group": lambda c: tl.GroupNorm(c, 8),
    "layer": tl.GroupNorm1,
    "layer_channel": tl.LayerNorm2d,
    "rms": tl.RmsNorm2d,
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "local_response": lambda c: nn.LocalResponseNorm(5),
}
BARS = {
    **dict.fromkeys(["batch"], 1.1),
    **dict.fromkeys(["batch_renorm"], 1.25),
    **dict.fromkeys(["group", "layer", "layer_channel", "rms", "affine", "dynamic_tanh"], 1.5),
    **dict.fromkeys(["ghost_batch", "instance", "filter_response", "l1_batch"], 2.0),
    **dict.fromkeys(
        ["evonorm_s0", "evonorm_b0", "switchable", "batch_instance", "batch_group", "power", "power-groups"], 3.0
    ),
}
ANY_OTHER = 5.0


def run(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> float:
    """Seconds of one forward and backward."""
    x.grad = None
    return seconds(x.device, lambda: layer(x).backward(dy))


def seconds(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of a call, until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Whole(nn.Module):
    """A layer by its formula as written, differentiated by autograd."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        with whole_formulas():
            return self.layer(x)


class WholeBatchNorm(nn.BatchNorm2d):
    """Batch norm as its formula reads."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), 0.1)
            self.running_var.lerp_(var.flatten(), 0.1)
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        return (x - mean) / (var + self.eps).sqrt() * weight + bias


def contenders(name: str, channels: int) -> dict[str, nn.Module]:
    """The layer, and what it is compared with."""
    registered, options = VARIANTS.get(name, (name, OPTIONS.get(name, {})))
    ours = normzoo.create_norm(registered, channels, **options)
    found = {"torch": nn.BatchNorm2d(channels), "ours": ours}
    if name in PEERS:
        found["peer"] = PEERS[name](channels)
    found["naive"] = (
        WholeBatchNorm(channels) if name == "batch" else Whole(normzoo.create_norm(registered, channels, **options))
    )
    return found


def key_of(shape: tuple[int, ...], kind: str) -> str:
    return f"{'x'.join(map(str, shape))} {kind}"


def sample(shape: tuple[int, ...], memory_format: torch.memory_format, device: str = "cpu") -> tuple[Tensor, Tensor]:
    x, dy = (torch.randn(shape, device=device).contiguous(memory_format=memory_format) for _ in range(2))
    return x.requires_grad_(), dy


def medians(
    layers: dict[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    dy: Tensor,
    rounds: int,
    calls: dict[str, Callable[[], Any]] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each layer and of each call, from rounds in which all take turns."""
    times: dict[str, list[float]] = {key: [] for key in layers}
    of_calls: dict[str, list[float]] = {key: [] for key in calls or {}}
    for _ in range(rounds + 3):
        for key, layer in layers.items():
            times[key].append(run(layer, x, dy))
        for key, call in (calls or {}).items():
            of_calls[key].append(seconds(x.device, call))
    first, second = ({key: statistics.median(t[3:]) for key, t in found.items()} for found in (times, of_calls))
    return first, second


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes kept for backward beside the input and the parameters, each storage counted once."""
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    del y
    return sum(kept.values())


def measure(name: str, rounds: int, compiled: bool, device: str = "cpu") -> dict[str, Any]:
    """All numbers of one layer; ratios are to nn.BatchNorm2d in the same rounds."""
    result: dict[str, Any] = {"eager": {}, "compiled": {}, "saved": {}, "floor": {}}
    for shape in SHAPES:
        for kind, memory_format in FORMATS.items():
            x, dy = sample(shape, memory_format, device)
            key = key_of(shape, kind)
            layers = {k: layer.to(device) for k, layer in contenders(name, shape[1]).items()}
            with torch.device(device):
                calls = kernels(x.detach(), dy, counts(name, kind))
            found, of_kernels = medians(layers, x, dy, rounds, calls)
            result["eager"][key] = {k: v / found["torch"] for k, v in found.items() if k != "torch"}
            result["eager"][key]["torch_ms"] = 1e3 * found["torch"]
            result["floor"][key] = floor(name, kind, of_kernels) / found["torch"]
            result["saved"][key] = saved_bytes(layers["ours"], x) / (x.numel() * x.element_size())
            if compiled and shape == COMPILED_SHAPE:
                torch._dynamo.reset()
                both = {"torch": layers["torch"], "ours": torch.compile(layers["ours"])}
                found, _ = medians(both, x, dy, rounds)
                result["compiled"][key] = found["ours"] / found["torch"]
    return result


def in_new_process(name: str, rounds: int, compiled: bool, threads: int) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare, initargs=(threads,)) as pool:
        return pool.submit(measure, name, rounds, compiled).result()


def prepare(threads: int) -> None:
    """Settings of a process that measures."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)


def summary(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    eager = result["eager"]
    worst = max(eager, key=lambda k: eager[k]["ours"])
    bar = BARS.get(name, ANY_OTHER)
    above = [k for k in eager if eager[k]["ours"] > bar]
    peers = [v["peer"] for v in eager.values() if "peer" in v]
    return {
        "name": name,
        "bar": bar,
        "best": min(v["ours"] for v in eager.values()),
        "worst": eager[worst]["ours"],
        "where": worst,
        "floor": result["floor"][worst],
        "over_floor": max((eager[k]["ours"] / result["floor"][k] for k in above), default=None),
        "peer": max(peers) if peers else None,
        "naive": max(v["naive"] for v in eager.values()),
        "compiled": max(result["compiled"].values()) if result["compiled"] else None,
        "saved": max(result["saved"].values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=sorted([*normzoo.list_norms(), *VARIANTS]))
    parser.add_argument("--no-compiled", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and arguments.write:
        parser.error("--write makes the page of the CPU; leave out --device")
    results, rows = {}, []
    for name in arguments.only:
        compiled = not arguments.no_compiled
        if arguments.device == "cpu":
            results[name] = in_new_process(name, arguments.rounds, compiled, arguments.threads)
        else:
            results[name] = measure(name, arguments.rounds, compiled, arguments.device)
        rows.append(row := summary(name, results[name]))
        shown = {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row.items()}
        print("  ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
        for key, v in results[name]["eager"].items() if len(arguments.only) < 4 else ():
            print("   ", key, {k: round(t, 2) for k, t in v.items()}, "floor", round(results[name]["floor"][key], 2))
    if arguments.write:
        from _norms_page import write

        machine = {
            "processor": processor(),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "torch": torch.__version__,
            "timm": timm_version(),
            "python": platform.python_version(),
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
        }
        write(ROOT, rows, results, machine)
        costs = {
            row["name"]: [round(row["best"], 2), round(row["worst"], 2)] for row in rows if row["name"] not in VARIANTS
        }
        text = json.dumps({"machine": machine, "costs": costs}, indent=1) + "\n"
        (ROOT / "normzoo" / "layer_costs.json").write_text(text, encoding="utf-8")


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def timm_version() -> str:
    import timm

    return timm.__version__


def keep_freed_memory() -> None:
    """Start again with an allocator that keeps what is freed: fresh memory costs more than the layers do."""
    wanted = {
        "MALLOC_TOP_PAD_": "268435456",
        "MALLOC_TRIM_THRESHOLD_": "4294967296",
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
    }
    if sys.platform == "linux" and any(os.environ.get(k) != v for k, v in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


if __name__ == "__main__":
    keep_freed_memory()
    main()
