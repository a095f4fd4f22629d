"""Stands in for SGLang's CUDA kernels, so that SGLang runs on a CPU, for tests. A kernel really called raises."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types

import unpinned

__path__: list[str] = []  # a package: `sgl_kernel.anything` can be imported


def _kernel(name):
    def missing(*args, **kwargs):
        raise NotImplementedError(f"{name} was called, a CUDA kernel that this machine has not")

    missing.__name__ = name.rsplit(".", 1)[-1]
    return missing


class _Submodule(types.ModuleType):
    ScalarType = type("ScalarType", (), {})

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _kernel(f"{self.__name__}.{name}")


class _ScalarTypes:
    def __getattr__(self, name):
        return name


_Submodule.scalar_types = _ScalarTypes()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("sgl_kernel.") else None

    def create_module(self, spec):
        return _Submodule(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())
unpinned.install()


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _kernel(f"sgl_kernel.{name}")
