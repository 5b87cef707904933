"""At which modules channels are followed along an update, and which weights lie before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from normzoo.callbacks._run.facts import Run
from normzoo.callbacks._run.frames import module_tensors
from normzoo.callbacks._run.modules import find_modules, none_found
from normzoo.functional.channel_moments import channel_moments, merge_moments
from normzoo.recognition import channel_dim, is_norm
from normzoo.replaying.calls import Call, dense

# Of the depth: layers 8, 44 and 80 of a ResNet-110, as in Bjorck et al. 2018, arXiv 1806.02375
_DEPTHS = (8, 44, 80)
_OF = 110


def chosen_sites(run: Run, calls: Sequence[Call], sites: str | Sequence[str] | None = None) -> dict[str, str]:
    """The modules whose channels are followed, and on which side: norms at their inputs, others at their outputs.

    Args:
        run: of which they are.
        calls: of a pass, in the order in which modules return.
        sites: names of modules, with ``*`` as in a shell, or ``"norms"``; by default three of the normalization layers,
            or without any of the convolutions and linear layers, at 7, 40 and 73 per cent of the depth.

    Raises:
        ValueError: if no module that is called is one of ``sites``.
    """
    called = {call.name: call.module for call in calls}
    if sites is not None:
        named = [name for name in find_modules(run.module, sites) if name in called]
        if not named:
            raise ValueError(none_found(run.module, sites))
    else:
        norms = [name for name in find_modules(run.module, "norms") if name in called]
        weighted = [n for n, m in called.items() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        order = [*called]
        layers = sorted(norms or weighted, key=order.index)
        places = [-(-len(layers) * depth // _OF) for depth in _DEPTHS] if layers else []
        named = list(dict.fromkeys(layers[place - 1] for place in places))
    return {name: "input" if is_norm(called[name]) else "output" for name in named}


def weights_of_sites(run: Run, calls: Sequence[Call], sites: Iterable[str]) -> dict[str, str]:
    """For each site the weight matrix that its values come from: its own, or that of the last call before, by name."""
    matrices = {name: t for name, t in module_tensors(run).items() if t.ndim > 1}
    named = dict(run.module.named_parameters())
    weights: dict[str, str] = {}
    for site in sites:
        place = next(i for i, call in enumerate(calls) if call.name == site)
        for call in reversed(calls[: place + 1]):
            own = [name for name in matrices if name.rpartition(".")[0] == call.name and name in named]
            if own:
                weights[site] = own[0]
                break
    return weights


class ChannelTaker:
    """Takes the moments of channels at sites, of the first call in each micro-batch.

    Attributes:
        moments: by site packed moments, (3, C), of each micro-batch; none where values have no channels along the
            dimension of the module.
    """

    def __init__(self, sites: Mapping[str, str]) -> None:
        self._sites = sites
        self.moments: dict[str, list[Tensor]] = {}

    def __call__(self, call: Call, side: str, tensors: Sequence[Tensor]) -> None:
        """Take the moments of a call if it is at a site."""
        if call.number or self._sites.get(call.name) != side:
            return
        x = dense(tensors[0]) if tensors else torch.empty(0)
        dim = channel_dim(call.module, 1)
        if not x.is_floating_point() or not -x.ndim <= dim < x.ndim:
            return
        # Squares of values beyond 1e19 are no float32
        self.moments.setdefault(call.name, []).append(channel_moments(x.double(), dim))

    def merged(self) -> dict[str, Tensor]:
        """(3, C) of all micro-batches, by site; without sites whose number of channels varies."""
        return {
            site: merge_moments(torch.stack(parts))
            for site, parts in self.moments.items()
            if len({part.shape for part in parts}) == 1
        }
