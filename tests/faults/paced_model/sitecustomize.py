"""On a worker's PYTHONPATH: each pass of its model under transformers takes ``PACED_MODEL_S`` seconds longer. A stream
of n tokens lasts at least n times that, on any machine: a kill finds it unended, however late the slowest one began."""

import importlib.machinery
import os
import sys
import time
from importlib.abc import MetaPathFinder

_pace_s = float(os.environ["PACED_MODEL_S"])
_EMBEDDINGS = "torch.nn.modules.sparse"


class _Paced(MetaPathFinder):
    """Lets torch be imported when the worker does so; then slows the token embedding, which a pass begins with."""

    def find_spec(self, name, path, target=None):
        if name != _EMBEDDINGS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_paced(module):
            execute(module)
            forward = module.Embedding.forward

            def paced(self, tokens):
                time.sleep(_pace_s)
                return forward(self, tokens)

            module.Embedding.forward = paced

        spec.loader.exec_module = execute_paced
        return spec


sys.meta_path.insert(0, _Paced())
