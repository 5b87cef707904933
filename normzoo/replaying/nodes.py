"""Which module has made a node of autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class NodeOwners:
    """Names of the modules in whose forward the nodes of a graph were made, kept in the nodes themselves.

    Numbers of autograd's nodes are counted in each thread by itself, so that they do not tell which node of a
    recomputation on a GPU belongs to which module; the metadata of a node do.
    """

    def label(self, tensors: Iterable[Tensor], name: str) -> None:
        """Give all nodes that tensors come from, and that have no name yet, this one."""
        left = [t.grad_fn for t in tensors]
        while left:
            node = left.pop()
            if node is None or node.name().endswith("AccumulateGrad") or self in (metadata := _metadata(node)):
                continue
            metadata[self] = name
            left += [before for before, _ in node.next_functions]

    def running(self) -> str | None:
        """The name at the node whose backward is computed now; None outside of a backward pass, or without a name."""
        node = torch._C._current_autograd_node()
        return None if node is None else _metadata(node).get(self)


def _metadata(node: Any) -> dict[Any, Any]:
    return node.metadata  # a property, whatever the stubs of torch say
