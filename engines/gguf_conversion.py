"""``python -m tokenfleet.engines.gguf_conversion FILE.gguf FOLDER``: a GGUF file as a safetensors folder.

A program of its own, so that the process that wants the folder needs neither torch nor the memory (engines/models.py).
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise to bfloat16 and save with tokenizer and chat template. About 80 s for 135M parameters on 2 cores."""
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where,
        # Kept packed (the default), the weights can't be saved.
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
