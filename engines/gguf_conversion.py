"""``python -m tokenfleet.engines.gguf_conversion FILE.gguf FOLDER``: a GGUF file as a safetensors folder.

A program of its own, so that the process that wants the folder needs neither torch nor the memory (engines/models.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


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
    mend(tokenizer, read_fields(gguf))
    tokenizer.save_pretrained(folder)


def read_fields(gguf: Path) -> dict[str, Any]:
    """What the file says of its tokenizer: of ``tokenizer.ggml.*`` by the last part of the name."""
    from gguf import GGUFReader

    prefix = "tokenizer.ggml."
    fields = GGUFReader(gguf).fields.items()
    return {name.removeprefix(prefix): field.contents() for name, field in fields if name.startswith(prefix)}


def mend(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Give a byte-level tokenizer its decoder and its special tokens, as the file has them.

    transformers before 5.19 reads one as if it were SentencePiece's (transformers/integrations/ggml.py): its texts are
    right, but its EOS is not, and grammars, which look at its decoder, take "\u0120" for a letter.
    """
    from tokenizers import decoders

    backend = tokenizer.backend_tokenizer
    if fields.get("model") != "gpt2" or isinstance(backend.decoder, decoders.ByteLevel):
        return
    backend.decoder = decoders.ByteLevel()
    backend.model.byte_fallback = backend.model.fuse_unk = False
    backend.model.unk_token = None
    for kind, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token_id := fields.get(f"{field}_token_id")) is not None:
            setattr(tokenizer, f"{kind}_token", fields["tokens"][token_id])


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
