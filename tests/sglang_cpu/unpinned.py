"""Lets SGLang ask for pinned memory, as its adapters do on every device, where torch has no allocator of it: the memory
is of the common kind then."""

from __future__ import annotations

import functools

import torch


def install():
    for name in ("tensor", "empty", "zeros", "ones", "arange"):
        setattr(torch, name, _unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor


def _unpinned(make):
    @functools.wraps(make)
    def made(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return made
