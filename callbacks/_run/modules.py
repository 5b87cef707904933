"""Modules of a run: which there are, which a compiler made, and what they are given and return."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from normzoo._errors import shown
from normzoo.callbacks._run.facts import Run, plain_name
from normzoo.callbacks._run.isolation import Snapshot, isolated, isolated_passes
from normzoo.recognition import is_norm

Site = tuple[str, str]  # name of the module, and one of
SIDES = ("input", "output")
_NOT_CALLED = (Metric, MetricCollection, nn.ModuleList, nn.ModuleDict)  # or not as a part of the network


def find_modules(
    root: nn.Module, wanted: str | Sequence[str], norms: Collection[nn.Module] = ()
) -> dict[str, nn.Module]:
    """The modules below ``root`` that are norms, for ``"norms"``, or whose names match a pattern, in their order.

    ``norms`` are further modules that are norms.
    A norm inside a norm is a part of it. Metrics are not part of the network.
    """
    patterns = [wanted] if isinstance(wanted, str) else wanted
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for full, module in root.named_modules():
        name = plain_name(full)
        if not name or isinstance(module, _NOT_CALLED) or hasattr(module, "_orig_mod") or name.startswith(inside):
            continue  # the module that torch.compile wraps comes under the same name
        if "norms" in patterns and (is_norm(module) or module in norms):
            found[name] = module
            inside = (*inside, f"{name}.")
        elif any(fnmatch.fnmatchcase(name, p) for p in patterns):
            found[name] = module
    return found


def none_found(root: nn.Module, wanted: str | Sequence[str]) -> str:
    """For an error where :func:`find_modules` finds nothing: that nothing is ``wanted``, and what there is."""
    what = "is a normalization layer" if wanted == "norms" else f"matches {wanted!r}"
    return f"no module {what}; there are {', '.join(name for name, _ in root.named_modules() if name)}"


def overrides(owner: object, method: str) -> bool:
    """Whether a module or callback has a method of its own in the place of one of Lightning's."""
    found = getattr(type(owner), method, None)
    return found is not None and found.__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def makes_modules_later(pl_module: nn.Module) -> bool:
    """Whether it has a ``configure_model`` of its own, which runs after setup."""
    return overrides(pl_module, "configure_model")


def compiled_modules(run: Run) -> set[nn.Module]:
    """The modules in what ``torch.compile`` makes, which does not run hooks that are set later."""
    return {module for root in _compiled_roots(run) for module in root.modules()}


def scripted_modules(root: nn.Module) -> set[nn.Module]:
    """The modules that ``torch.jit`` has made, which run no hooks of Python functions."""
    roots = (m for m in root.modules() if "ScriptModule" in {c.__name__ for c in type(m).__mro__})
    return {module for root in roots for module in root.modules()}


def _compiled_roots(run: Run) -> Iterator[nn.Module]:
    if run.compiled:
        yield run.module
    for module in run.module.modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            yield module
        for value in _inside(vars(module).values()):  # self.forward = torch.compile(self.forward), also in a list
            owner = getattr(_compiled(value), "__self__", None) or getattr(value, "_orig_mod", None)
            if isinstance(owner, nn.Module):
                yield owner
        if any(_compiled(function) is not None for c in type(module).__mro__ for function in vars(c).values()):
            yield module  # a method with @torch.compile


def _inside(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and what is in lists, tuples, sets and dictionaries among them."""
    seen: set[int] = set()
    left = list(values)
    while left:
        value = left.pop()
        if not isinstance(value, list | tuple | set | dict):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value


def _compiled(function: object) -> Callable[..., Any] | None:
    """The function that ``torch.compile`` was given; None if this is none of its results."""
    if not callable(function) or getattr(function, "_torchdynamo_disable", False):
        return None
    original = getattr(function, "_torchdynamo_orig_callable", None)
    return original and inspect.unwrap(original)


class Listener:
    """Hooks of modules for one micro-batch, each of which takes in the first call.

    Later calls are left out: what activation checkpointing computes again, and further uses of a shared module. Code
    that ``torch.compile`` has made runs no hooks that are set later: if it calls one of the modules, the micro-batch
    goes through ``training_step`` once more, uncompiled and in isolation, before it is trained on.

    Args:
        sites: the modules, by their names and sides.
        who: what listens, for messages.

    Raises:
        ValueError: for a site that is not named so; for a module that ``torch.jit`` has made; for one that is compiled
            if ``training_step`` cannot be evaluated once more.
    """

    def __init__(self, run: Run, sites: Mapping[Site, nn.Module], who: str) -> None:
        for site in sites:
            if not (isinstance(site, tuple) and len(site) == 2 and site[1] in SIDES):
                raise ValueError(
                    f"sites of {who} must be named by (name of the module, 'input' or 'output'), not {shown(site)}"
                )
        self.sites = sites
        scripted, compiled = scripted_modules(run.module), compiled_modules(run)
        hidden = [name for (name, _), module in sites.items() if module in scripted]
        if hidden:
            raise ValueError(
                f"{who} cannot listen to {hidden[0]}: torch.jit has made it, and runs no hooks; choose sites outside "
                "of it, or train what it was made from"
            )
        self._apart = any(module in compiled for module in sites.values())
        if self._apart:
            instead = "train without torch.compile, or choose sites outside of what it compiles"
            run.check_forward(f"{who}, for modules that are compiled,", instead)
        # Deeper ones are those in which another measurement evaluates something
        self._passes = isolated_passes() + self._apart
        self._handles: list[Any] = []

    def listen(self, run: Run, batch: Any, batch_idx: int, take: Callable[[Site, nn.Module, Any], None]) -> None:
        """Hand what the modules are given and return in this micro-batch to a function, until :meth:`close`."""
        seen: set[Site] = set()

        def hear(site: Site, module: nn.Module, x: Any) -> None:
            if site not in seen and isolated_passes() == self._passes:
                seen.add(site)
                take(site, module, x)

        self.close()
        if not self._apart:
            self._add_hooks(hear)
            return
        with isolated(Snapshot(run.module, batch), run), torch.compiler.set_stance("force_eager"):
            self._add_hooks(hear)
            try:
                run.forward(batch, batch_idx)
            finally:
                self.close()

    def _add_hooks(self, hear: Callable[..., None]) -> None:
        for site, module in self.sites.items():
            if site[1] == "input":
                hook = partial(_before, hear, site)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(partial(_after, hear, site)))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _before(hear: Callable[..., None], site: Site, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    hear(site, module, next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None))


def _after(hear: Callable[..., None], site: Site, module: nn.Module, args: Any, output: Any) -> None:
    hear(site, module, output)
