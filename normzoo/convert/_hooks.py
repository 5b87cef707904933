"""Hooks of a layer that another takes the place of."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

from torch import nn
from torch.nn.modules.module import _WrappedHook

from normzoo.convert._trial import is_of_hooks


def share_hooks(new: nn.Module, old: nn.Module) -> None:
    """Make both layers hold the same hooks, so that handles got from the one remove them from the other too.

    Those are hooks of forward, backward and state dicts, in their order, and what is to be known of each: whether it
    takes keyword arguments, is always called, and is of the full backward pass. Hooks that the new layer was made with
    stay, before the old one's; handles then remove them from the old layer alone.
    """
    for name, hooks in vars(old).items():
        if not is_of_hooks(name) or not isinstance(hooks, MutableMapping):
            continue
        own = vars(new).get(name)
        if own:
            own.update(hooks)
        else:
            vars(new)[name] = hooks
    if new._is_full_backward_hook is None:
        new._is_full_backward_hook = old._is_full_backward_hook


def hand_over_hooks(new: nn.Module, old: nn.Module) -> None:
    """Give load hooks that are called with their module the new one, once the old one is not in the model any more."""
    for hook in new._load_state_dict_pre_hooks.values():
        if isinstance(hook, _WrappedHook) and hook.with_module and hook.module() is old:
            hook.module = weakref.ref(new)
