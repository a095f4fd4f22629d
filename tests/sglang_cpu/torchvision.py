"""Stands in for torchvision where it is not installed (`make setup-sglang-cpu` does). SGLang and transformers import it
for models that see; calling any of it raises."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types

__path__: list[str] = []
__version__ = "0"


class _Anything(type):
    def __getattr__(cls, name):
        return _missing(name)


class _Missing(metaclass=_Anything):
    """A class, a function or an enumeration, as the importing line needs."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError(f"torchvision's {type(self).__name__} is not part of this environment")


def _missing(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (_Missing,), {})


class _Submodule(types.ModuleType):
    def __getattr__(self, name):
        return _missing(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None

    def create_module(self, spec):
        return _Submodule(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())
__getattr__ = _missing
