"""What symbolic tracing and TorchScript make of the zoo's modules."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


class Leaf(nn.Module):
    """A module that every tracer of ``torch.fx`` records as one call, as it does PyTorch's own layers.

    Tracers look into modules outside ``torch.nn`` and pass them stand-ins that have neither shape nor values, which
    formulas ask for. The recorded call is that of the module, so that ``train()``, ``eval()``, hooks, copies and state
    dicts of the traced model are those of the layer.
    """

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        # Where PyTorch runs a module's hooks: these are to run in the traced model, and not on stand-ins.
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                return self.recorded(value.tracer, args, kwargs)
        return super()._call_impl(*args, **kwargs)

    def recorded(self, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Proxy:
        """Record a call of this module.

        Args:
            tracer: a ``torch.fx.Tracer`` at work.
            args: of the call.
            kwargs: of the call.

        Raises:
            NameError: if the model that is traced does not hold this module.
        """
        try:
            if not hasattr(tracer, "path_of_module"):
                raise NameError("the proxy belongs to a graph alone, which has no modules")
            path = tracer.path_of_module(self)
        except NameError as error:
            raise NameError(
                f"torch.fx cannot record a call of {type(self).__name__}, since the traced model does not hold this "
                "layer: assign it to an attribute of the model, or put it into an nn.ModuleList"
            ) from error
        return tracer.create_proxy("call_module", path or "leaf", args, kwargs or {})

    @property
    def leaf(self) -> Leaf:
        """The module itself: its name in a graph traced of it alone, where calls name attributes of the root."""
        return self

    def __prepare_scriptable__(self) -> Leaf:
        """What ``torch.jit.script`` calls first, for each module of a model.

        Raises:
            RuntimeError: always; TorchScript supports neither the layers' Python code nor their own backward passes.
        """
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose Python code TorchScript does not support: "
            "use torch.export.export, torch.compile or torch.jit.trace"
        )
