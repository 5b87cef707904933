"""Which layer's output is another layer's input, and nobody else's: seen by running the model."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from normzoo.convert._outputs import floating, sampled, tensors_in
from normzoo.convert._running import evaluating, run_example
from normzoo.convert._selections import Selections
from normzoo.convert._trial import eagerly

# Operations tried for whether scales of channels pass through them.
_STEPS = {
    f"aten::{name}"
    for name in (
        *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
        *(
            "adaptive_max_pool1d",
            "adaptive_max_pool2d",
            "adaptive_max_pool3d",
            "avg_pool1d",
            "avg_pool2d",
            "avg_pool3d",
        ),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d"),
        *("_adaptive_avg_pool3d", "mean", "amax", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
        *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
        *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d"),
        *("replication_pad3d", "pad", "constant_pad_nd"),
    )
}
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


@dataclass(eq=False)
class Step:
    """A call of an operation between layers that may let scales through, such as max-pooling."""

    func: Any
    args: Any
    kwargs: Any
    input: Seen

    @property
    def name(self) -> str:
        """The operation's name."""
        return _name(self.func)

    def passes(self, scale: Tensor, shift: Tensor, dim: int) -> int | None:
        """The dimension of the output's channels if a scale and shift of the input's is one of the output; else None.

        It is tried in float64 on values of both signs, for the (C,) scale and shift, of channels in dimension ``dim``.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.input.shape, generator=generator, dtype=torch.float64)
        try:
            y = self(x)
            scaled = self(_along(x, scale, dim).add_(_along(torch.ones_like(x), shift, dim)))
        except Exception:  # not implemented for float64 on the CPU
            return None
        for out in range(y.ndim):
            if y.shape[out] == scale.numel():
                wanted = _along(y, scale, out) + _along(torch.ones_like(y), shift, out)
                if bool(((scaled - wanted).abs() <= 1e-9 * wanted.abs().amax()).all()):
                    return out
        return None

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = tree_map_only(_Slot, lambda _: x, (self.args, self.kwargs))
        return next(t for t in tree_leaves(self.func(*args, **kwargs)) if isinstance(t, Tensor))


class _Slot:
    """Stands for the tensor that an operation was called with."""


Node = nn.Module | Step


@dataclass(frozen=True)
class Link:
    """What made the input of a layer.

    Attributes:
        maker: the layer or operation whose output it is.
        output: how it returned it.
        taker: the layer or operation whose input it is.
        input: how it was given it.
        problem: why the output may not be changed, with ``{}`` for the name of ``blamed``; empty where it is used for
            nothing else, and maker and taker are each called once.
        blamed: the layer that the problem is about.
    """

    maker: Node
    output: Seen
    taker: Node
    input: Seen
    problem: str = ""
    blamed: Node | None = None


@dataclass
class Flow:
    """What one run of the model showed.

    Attributes:
        calls: how often each watched layer was called.
        into: of layers and operations whose input another one made: how, for each taker.
        out_of: the same links by their makers.
        inside: of watched layers that were called by another one: which.
        used: layers whose parameters or buffers are used by others.
        makers: of watched layers whose input an operation outside of all watched ones made: its name.
        ends: of each watched layer that was called once with a tensor and returned one: input and output.
        outputs: the floating-point tensors that the model returned.
        samples: some values of each output of the layers to compare, by name, for each call.
    """

    calls: Counter[nn.Module] = field(default_factory=Counter)
    into: dict[Node, Link] = field(default_factory=dict)
    out_of: dict[Node, Link] = field(default_factory=dict)
    inside: dict[nn.Module, nn.Module] = field(default_factory=dict)
    used: set[nn.Module] = field(default_factory=set)
    makers: dict[nn.Module, str] = field(default_factory=dict)
    ends: dict[nn.Module, tuple[Seen, Seen]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    samples: dict[str, list[tuple[torch.Size, Tensor]]] = field(default_factory=dict)


def trace_flow(
    model: nn.Module,
    layers: Sequence[nn.Module],
    example: Any = None,
    *,
    compared: Mapping[str, nn.Module] | None = None,
    selections: Selections | None = None,
) -> Flow:
    """Run the model once on an example, in evaluation, and see how data flows between some of its layers.

    Args:
        model: any module.
        layers: those between which to see it.
        compared: layers to take samples of the outputs of, by name.
        selections: what the model selects by its values goes there if there is nothing yet, and is repeated else.
        example: one input batch; a tuple is several arguments, a dict keyword arguments. By default made from what the
            model tells of its input.

    Raises:
        ValueError: if there is no example and the model refuses the inputs that were tried.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    problem: Exception | None = None
    for x in _examples(model) if example is None else [example]:
        chosen = Selections() if selections is None else selections
        repeats = bool(chosen.entries)
        with torch.random.fork_rng(devices), evaluating(model), torch.no_grad(), eagerly():
            try:
                with chosen.repeated(layers) if repeats else chosen.recorded(layers):
                    return _Watch(layers, compared or {}).run(model, x)
            except Exception as error:
                if example is not None:
                    raise
                chosen.entries.clear()
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

    def __init__(self, layers: Sequence[nn.Module], compared: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.flow = Flow()
        self.compared = compared
        self.paused = False
        self.held = {m: {storage_of(t) for t in _tensors(m)} for m in layers}
        self.ours = {key for keys in self.held.values() for key in keys}
        self.made: dict[int, tuple[Node, Seen]] = {}
        self.taken: dict[int, list[tuple[Node, Seen]]] = {}
        self.alive: dict[int, StorageWeakRef] = {}  # as long as it is referred to here, no other gets its address
        self.makers: dict[int, str] = {}
        self.uses: Counter[int] = Counter()
        self.inside: list[nn.Module] = []
        self.own: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or _is_view(func):  # what is read or written through a view is seen when it is
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if (
            not self.inside
            and func._schema.name in _STEPS
            and len(tensors) == 1
            and storage_of(tensors[0]) in self.made
        ):
            return self._step(func, args, kwargs, tensors[0])
        for t in tensors:
            if (key := storage_of(t)) not in self.own:
                self._use(key)
        result = func(*args, **kwargs)
        if not self.inside and isinstance(result, Tensor):
            self.makers[storage_of(result)] = _name(func)
        return result

    def _step(self, func: Any, args: Any, kwargs: Any, x: Tensor) -> Any:
        """Call an operation that may let scales through, as if it were a layer."""
        result = func(*args, **kwargs)
        y = next(t for t in tree_leaves(result) if isinstance(t, Tensor))
        if storage_of(y) == storage_of(x):
            self._use(storage_of(x))
            return result
        empty_args, empty_kwargs = tree_map_only(Tensor, lambda _: _Slot(), (args, kwargs))
        step = Step(func, empty_args, empty_kwargs, _seen(x))
        self.taken.setdefault(storage_of(x), []).append((step, step.input))
        self._make(step, y)
        return result

    def _make(self, node: Node, y: Tensor) -> None:
        key = storage_of(y)
        self.alive[key] = StorageWeakRef(y.untyped_storage())
        self.made[key] = (node, _seen(y))

    def _use(self, key: int) -> None:
        if key in self.ours or key in self.made:  # others' addresses may be used again
            self.uses[key] += 1

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.flow.calls[module] += 1
        self.inside.append(module)
        if len(self.inside) > 1:
            self.flow.inside[module] = self.inside[0]
            return
        self.own = set(self.held.get(module, ()))
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):
            seen, key = _seen(inputs[0]), storage_of(inputs[0])
            self.own.add(key)
            self.flow.ends[module] = (seen, seen)
            if key in self.made:
                self.taken.setdefault(key, []).append((module, seen))
            elif key in self.makers:
                self.flow.makers[module] = self.makers[key]

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
        self._make(module, output)

    def _sample(self, name: str) -> Callable[..., None]:
        """A hook that keeps some values of a layer's output."""

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.paused = True
            try:
                for y in tensors_in(output):
                    if y.is_floating_point():
                        self.flow.samples.setdefault(name, []).append((y.shape, sampled(y)))
            finally:
                self.paused = False

        return keep

    def run(self, model: nn.Module, example: Any) -> Flow:
        with contextlib.ExitStack() as stack:
            for module in self.held:
                stack.callback(module.register_forward_pre_hook(self.enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(self.leave).remove)
            for name, module in self.compared.items():
                stack.callback(module.register_forward_hook(self._sample(name)).remove)
            stack.enter_context(self)
            result = run_example(model, example)
        for t in tensors_in(result):
            self._use(storage_of(t))
        if not all(weak.expired() for weak in self.alive.values()):
            gc.collect()
        self.flow.outputs = floating(result)
        self.flow.used = {m for m, held in self.held.items() if any(self.uses[key] for key in held)}
        for key, (maker, output) in self.made.items():
            takers = self.taken.get(key, [])
            for taker, given in takers:
                link = Link(maker, output, taker, given, *self._problem(key, maker, taker))
                self.flow.into.setdefault(taker, link)
                self.flow.out_of.setdefault(maker, link)
        return self.flow

    def _problem(self, key: int, maker: Node, taker: Node) -> tuple[str, Node | None]:
        """Why a layer's output may not be changed, and the layer that is to blame."""
        for node in (maker, taker):
            if isinstance(node, Step):
                continue
            if self.flow.calls[node] != 1:
                return f"{{}} is called {self.flow.calls[node]} times", node
            if node in self.flow.used:
                return "a parameter or buffer of {} is used elsewhere too", node
        if len(self.taken[key]) != 1 or self.uses[key]:
            return "the output of {} is used elsewhere too", maker
        # what is still there is kept by someone, who may read it
        return ("", None) if self.alive[key].expired() else ("the output of {} is kept by the model", maker)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _along(x: Tensor, values: Tensor, dim: int) -> Tensor:
    """The values of each channel times a tensor."""
    return (x.movedim(dim, -1) * values).movedim(-1, dim)


def _seen(t: Tensor) -> Seen:
    return Seen(tuple(t.shape), t.stride(), int(t.storage_offset()), t.dtype)


def _name(func: Any) -> str:
    """An operation's name: ``max_pool2d``."""
    name = getattr(getattr(func, "_schema", None), "name", "") or str(func)
    return str(name.rpartition("::")[2].removesuffix("_with_indices").rstrip("_"))


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
