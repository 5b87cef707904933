"""Which layer's output is another layer's input, and nobody else's: seen by running the model."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normzoo.convert._running import evaluating, run_example
from normzoo.convert._trial import eagerly

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@dataclass(frozen=True)
class Seen:
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def same_channels(self, dim: int, other: Seen, other_dim: int) -> bool:
        """Whether both are all of the same values, each of which belongs to the same channel in both.

        That holds for views that move or join dimensions, if both have the channel's stride: of dense memory, the
        value at position p is of channel ``p // stride % channels``.
        """
        c = self.shape[dim]
        lies_alike = c == 1 or self.stride[dim] == other.stride[other_dim]
        whole = (
            self.dtype == other.dtype
            and self._dense()
            and other._dense()
            and self.offset == other.offset
            and self.numel() == other.numel() > 0
        )
        return other.shape[other_dim] == c and lies_alike and whole

    def numel(self) -> int:
        """How many values it has."""
        return torch.Size(self.shape).numel()

    def _dense(self) -> bool:
        """Whether its values fill memory without gaps and without two in one place."""
        expected = 1
        for stride, size in sorted((st, n) for st, n in zip(self.stride, self.shape, strict=True) if n != 1):
            if stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True)
class Link:
    """A layer whose output is used for nothing but as the input of another; each is called once."""

    maker: nn.Module
    output: Seen
    taker: nn.Module
    input: Seen


@dataclass
class Flow:
    """What one run of the model showed.

    Attributes:
        calls: how often each watched layer was called.
        links: see :class:`Link`.
        ends: of each watched layer that was called once with a tensor and returned one: input and output.
        outputs: the floating-point tensors that the model returned.
    """

    calls: Counter[nn.Module] = field(default_factory=Counter)
    links: list[Link] = field(default_factory=list)
    ends: dict[nn.Module, tuple[Seen, Seen]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)


def watch(model: nn.Module, layers: Sequence[nn.Module], example: Any = None) -> Flow:
    """Run the model once on an example, in evaluation, and see how data flows between some of its layers.

    Args:
        model: any module.
        layers: those to watch.
        example: one input batch; a tuple is several arguments, a dict keyword arguments. By default made from what the
            model tells of its input.

    Raises:
        ValueError: if there is no example and the model refuses the inputs that were tried.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    problem: Exception | None = None
    for x in _examples(model) if example is None else [example]:
        with torch.random.fork_rng(devices), evaluating(model), torch.no_grad(), eagerly():
            try:
                return _Watch(layers).run(model, x)
            except Exception as error:
                if example is not None:
                    raise
                problem = problem or error
    raise ValueError(
        f"which layers of {type(model).__name__} follow each other is seen by running it once, and no input for it "
        f"is known: pass example=, a batch of its inputs"
        f"{'' if problem is None else f' (a guess failed: {problem})'}"
    ) from problem


def storage_of(t: Tensor) -> int:
    """What identifies the memory that a tensor shares with its views, while some tensor of it is alive."""
    try:
        return t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError, ValueError):  # sparse and lazy tensors have none
        return 0


class _Watch(TorchDispatchMode):
    """Sees every operation on a watched layer's tensors that is not the layer's own."""

    supports_higher_order_operators = True

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.flow = Flow()
        self.held = {m: {storage_of(t) for t in _tensors(m)} for m in layers}
        self.ours = {key for keys in self.held.values() for key in keys}
        self.made: dict[int, tuple[nn.Module, Seen]] = {}
        self.taken: dict[int, list[tuple[nn.Module, Seen]]] = {}
        self.alive: dict[int, StorageWeakRef] = {}  # as long as it is referred to here, no other gets its address
        self.uses: Counter[int] = Counter()
        self.inside: list[nn.Module] = []
        self.own: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_view(func):  # what is read or written through a view is seen when it is
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor) and (key := storage_of(t)) not in self.own:
                    self._use(key)
        return func(*args, **(kwargs or {}))

    def _use(self, key: int) -> None:
        if key in self.ours or key in self.made:  # others' addresses may be used again
            self.uses[key] += 1

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.flow.calls[module] += 1
        self.inside.append(module)
        if len(self.inside) > 1:
            return
        self.own = set(self.held.get(module, ()))
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):
            seen, key = _seen(inputs[0]), storage_of(inputs[0])
            self.own.add(key)
            self.flow.ends[module] = (seen, seen)
            if key in self.made:
                self.taken.setdefault(key, []).append((module, seen))

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.inside.pop()
        if self.inside:
            return
        self.own = set()
        if not isinstance(output, Tensor) or not (key := storage_of(output)):
            return
        if key in self.made or key in self.ours or any(isinstance(x, Tensor) and storage_of(x) == key for x in inputs):
            self.uses[key] += 1  # it returned something that was there before
            return
        if module in self.flow.ends:
            self.flow.ends[module] = (self.flow.ends[module][0], _seen(output))
        self.alive[key] = StorageWeakRef(output.untyped_storage())
        self.made[key] = (module, _seen(output))

    def run(self, model: nn.Module, example: Any) -> Flow:
        with contextlib.ExitStack() as stack:
            for module in self.held:
                stack.callback(module.register_forward_pre_hook(self.enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(self.leave).remove)
            stack.enter_context(self)
            result = run_example(model, example)
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self._use(storage_of(t))
        links = [
            Link(maker, output, *takers[0])
            for key, (maker, output) in self.made.items()
            if len(takers := self.taken.get(key, [])) == 1
            and not self.uses[key]
            and self._alone(maker)
            and self._alone(takers[0][0])
        ]
        memory = {maker: self.alive[key] for key, (maker, _) in self.made.items()}
        if not all(memory[link.maker].expired() for link in links):
            gc.collect()
        # what is still there is kept by someone, who may read it
        self.flow.links = [link for link in links if memory[link.maker].expired()]
        self.flow.outputs = [t.clone() for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
        return self.flow

    def _alone(self, module: nn.Module) -> bool:
        """Whether a layer is called once, and nobody else uses its tensors."""
        return self.flow.calls[module] == 1 and not any(self.uses[key] for key in self.held[module])


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _seen(t: Tensor) -> Seen:
    return Seen(tuple(t.shape), t.stride(), int(t.storage_offset()), t.dtype)


def _is_view(func: Any) -> bool:
    """Whether an operation returns views of its input and does nothing else."""
    schema = getattr(func, "_schema", None)
    return (
        schema is not None
        and bool(schema.returns)
        and all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    )


def _examples(model: nn.Module) -> Iterator[Any]:
    """Inputs that a model may take: of its configuration, as Lightning's and timm's have, or of its first layer."""
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    given = getattr(model, "example_input_array", None)
    if given is not None:
        yield given
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)

    def batch(*size: int) -> Tensor:
        return torch.randn(2, *size, generator=generator).to(like)

    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    if size:
        yield batch(*size)
    layer: Any = next((m for m in model.modules() if isinstance(m, _WEIGHTED)), None)
    if isinstance(layer, nn.Linear):
        yield batch(layer.in_features)
        yield batch(4, layer.in_features)
    elif layer is not None:
        for pixels in (32, 64, 224) if len(layer.kernel_size) < 3 else (32,):
            yield batch(layer.in_channels, *[pixels] * len(layer.kernel_size))
