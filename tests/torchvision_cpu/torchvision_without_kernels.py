"""Lets torchvision's PyPI build, whose kernels want a CUDA build of torch, be imported beside a CPU build of it.

What resizes and normalises images is plain torch; the kernels (nms, roi_align …) are registered by two modules that
fail without them, and stay empty here. A ``.pth`` file imports this at the start of every process of an environment."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys

_REGISTRATIONS = frozenset({"torchvision._meta_registrations", "torchvision._autograd_registrations"})


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name not in _REGISTRATIONS or sys.modules["torchvision.extension"]._has_ops():
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Empty())
