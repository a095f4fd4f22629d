"""Real tokenizers of every kind that models ship, trained in a moment on a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. Das größte Übel, naïve café. 世界こんにちは мир 😀🚀 test",
    "Hello world, how are you today? I'm fine.  Two spaces.\nA new line.",
] * 20
_ASCII = [line.encode("ascii", "ignore").decode() for line in _CORPUS]


@cache
def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen, SmolLM: any token may be part of a character. Some added tokens, one of them special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("émoji😀", special=False)])
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """Llama 2, Mistral, Phi-3: words with U+2581 for spaces, a byte token for what is in no word, one space dropped."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator(_ASCII, trainer)
    state = json.loads(trained.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@cache
def byte_fallback_keeping_spaces() -> Tokenizer:
    """Gemma: the same without the dropped space."""
    tokenizer = Tokenizer.from_str(byte_fallback().to_str())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """T5, XLNet: unigrams; the first token drops its space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    """BERT: its decoder looks at a token's neighbours."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_keeping_spaces": byte_fallback_keeping_spaces,
    "metaspace": metaspace,
    "word_piece": word_piece,
}
