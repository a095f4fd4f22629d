"""Loads a model as the batches use it: weights, tokenizer, adapters, heads, and how to call its forward."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import AutoHfQuantizer

from tokenfleet.engines.base import EngineInfo
from tokenfleet.engines.families import cell_of, kinds_given
from tokenfleet.engines.folders import Folders, check_scores, check_weights, is_classifier
from tokenfleet.engines.media.positions import go_on_after_videos, space_frames
from tokenfleet.engines.media.processing import MediaProcessor, Prepared, load_processor
from tokenfleet.engines.rewards import RewardHead, classifier_head, find_value_head, no_rewards
from tokenfleet.engines.rope import scaled
from tokenfleet.engines.transformers_engine.adapters import AdapterChoice, merge
from tokenfleet.engines.transformers_engine.attention import use_grouped_sdpa
from tokenfleet.engines.transformers_engine.batch import Forward, Inputs, MediaInputs
from tokenfleet.engines.transformers_engine.kv import BatchCache
from tokenfleet.engines.transformers_engine.norms import simplify_norms
from tokenfleet.engines.transformers_engine.options import TransformersOptions
from tokenfleet.engines.transformers_engine.packing import pack
from tokenfleet.wire.errors import ConfigurationError, InvalidRequest
from tokenfleet.wire.support import Refusal

_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_PLAIN_POSITIONS = GenerationMixin._prepare_position_ids_for_generation
_CPU_SLOTS, _GPU_SLOTS = 16, 64
_QUANTIZERS = {"bnb": "bitsandbytes", "hqq": "hqq", "eetq": "eetq"}


class LoadedModel:
    """Everything about a loaded model. All of its tensors belong to the engine's thread."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        choice: AdapterChoice | None,
        head: RewardHead | None,
        media: MediaProcessor | None = None,
    ) -> None:
        self.model = model
        self.media = media
        self.tokenizer = tokenizer
        self.info: EngineInfo
        text_config = model.config.get_text_config()
        self.layers: int = text_config.num_hidden_layers
        self.vocab_size: int = text_config.vocab_size
        self.context_tokens: int = _context_tokens(text_config)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.can_generate: bool = model.can_generate()
        self._choice = choice
        self._head = head
        accepted = inspect.signature(model.forward).parameters
        self._wants_positions = "position_ids" in accepted
        self._wants_last = "logits_to_keep" in accepted
        self._accepted = frozenset(accepted)

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: BatchCache,
        adapters: Sequence[str | None],
        media: Inputs | None = None,
    ) -> torch.Tensor:
        """Logits of the last column, ``[rows, vocab]``; the new columns are in ``cache`` but not yet counted."""
        inputs = self._inputs(ids, mask, positions, cache)
        for name, value in (media or {}).items():
            inputs[name] = self._moved(value)
        if self._wants_last:
            inputs["logits_to_keep"] = 1
        out = self.model(**inputs) if self._choice is None else self._choice.run(adapters, inputs)
        return out.logits[:, -1]

    def reward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: BatchCache,
        adapters: Sequence[str | None],
        media: Inputs | None = None,
    ) -> torch.Tensor:
        """The reward of the last column, ``[rows]``, all rows with the same adapter."""
        assert self._head is not None
        if self._choice is not None:
            self._choice.activate(adapters[0])
        out = self.model.base_model(**self._inputs(ids, mask, positions, cache))
        return self._head(out.last_hidden_state[:, -1])

    @property
    def reads_both_ways(self) -> bool:
        """Whether a prompt's tokens see all of it (PaliGemma), so that it has to be read alone and in one pass."""
        return bool(getattr(self.model.config.get_text_config(), "use_bidirectional_attention", False))

    def text_inputs(self, prompt_ids: Sequence[int]) -> MediaInputs:
        """What a prompt without media is read with by a model that reads both ways."""
        types = {"token_type_ids": torch.zeros(1, len(prompt_ids), dtype=torch.long)}
        accepted = {name: value for name, value in types.items() if name in self._accepted}
        return MediaInputs(b"", len(prompt_ids), accepted)

    def media_inputs(self, prompt_ids: Sequence[int], prepared: Prepared) -> MediaInputs:
        """What the prompt is read with, positions included where the model has its own for images (Qwen-VL's three)."""
        assert self.media is not None
        lost = [name for name in prepared.inputs if name.startswith("pixel_values") and name not in self._accepted]
        if lost:  # it would read the places of what it was not given as words
            raise InvalidRequest(
                f"The model has no input {lost[0]!r}, which its processor makes of these media.",
                code="unsupported_modality",
                param="messages",
            )
        types = self.media.token_types(prompt_ids)
        # PaliGemma's say what is read in both directions (0): all of the prompt. Others mark media.
        own = torch.zeros_like(types) if self.model.config.model_type == "paligemma" else types
        inputs = dict(prepared.inputs) | {"mm_token_type_ids": types, "token_type_ids": own}
        positions, offset = None, 0
        if type(self.model)._prepare_position_ids_for_generation is not _PLAIN_POSITIONS:
            ids = torch.tensor([list(prompt_ids)])
            known = {**inputs, "attention_mask": torch.ones_like(ids)}
            positions = self.model._prepare_position_ids_for_generation(ids, known)
            if positions.dim() == 3:
                if (seconds := inputs.get("second_per_grid_ts")) is not None:
                    rate = self.model.config.vision_config.tokens_per_second
                    space_frames(positions[-3:, 0], types[0], inputs["video_grid_thw"].tolist(), seconds, rate)
                go_on_after_videos(positions[-3:, 0], types[0])
            # It leaves what it found in the model for the next step; here each row has its own.
            # The first of four rows, where there are four, is the plain place in the text.
            places = positions[1:] if len(positions) == 4 else positions
            offset = int(places.max()) + 1 - len(prompt_ids)
        accepted = {name: value for name, value in inputs.items() if name in self._accepted}
        return MediaInputs(prepared.digest, len(prompt_ids), accepted, positions, offset)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self.model.dtype) if value.is_floating_point() else value.to(self.device)

    @property
    def first_pass(self) -> Forward:
        """The pass to try whether the model computes at all."""
        return self.forward if self.can_generate else self.reward

    def _inputs(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: BatchCache
    ) -> dict[str, Any]:
        inputs = {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
            "past_key_values": cache,
            "use_cache": True,
            "return_dict": True,
        }
        if self._wants_positions:
            inputs["position_ids"] = positions.to(self.device)
        return inputs

    def batch_key(self, adapter: str | None) -> object:
        """Sequences with equal keys can share a forward pass."""
        return None if self._choice is None or self._choice.can_mix else adapter


def load(options: TransformersOptions) -> LoadedModel:
    """Raises `ConfigurationError` for what can't be loaded, saying why, `UnknownModel` for what isn't there."""
    if options.threads:
        torch.set_num_threads(options.threads)
    # Imported by peft wherever it is installed, it warns of kernels nobody needs and a cast in every layer and step.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    folders = Folders.of(options)
    folder, merged, chosen = folders.model, folders.fixed, folders.chosen
    check_weights(folder, options.shown_name, allow_pickle=options.allow_pickle)
    check_scores(folder, options.shown_name)
    device = _device(options)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
        _refuse_unknown_quantisation(config)
        _refuse_family(config, options)
        _scale_rope(config, options)
        media = None
        if _is_multimodal(config):
            media = load_processor(folder, tokenizer, options, trust_remote_code=options.trust_remote_code)
            tokenizer = media.tokenizer if media else tokenizer
        model = _weights(folder, config, device, options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigurationError(f"The model {options.shown_name!r} can't be loaded: {error}") from error
    _refuse_uncached(model, options)
    if merged and getattr(model, "is_quantized", False):
        raise ConfigurationError(
            "Adapters can't be merged into quantised weights.",
            hint="Name them under adapters, to be chosen per request, or load the model unquantised.",
        )
    model = merge(model, merged, allow_pickle=options.allow_pickle)
    model.eval().requires_grad_(False)
    head = find_value_head([*reversed(merged), folder]) if model.can_generate() else classifier_head(model)
    if head is not None:
        head.check_width(model.config.get_text_config().hidden_size)
    if options.rewards and head is None:
        raise no_rewards(options.shown_name)
    choice = AdapterChoice(model, chosen, allow_pickle=options.allow_pickle) if chosen else None
    dtype = model.dtype
    if options.flash_attn == "auto":
        use_grouped_sdpa(model)
    simplify_norms(model)
    if choice is None or choice.can_mix:
        pack(model)
    loaded = LoadedModel(model, tokenizer, choice, head, media)
    on_cpu = device.type == "cpu"
    loaded.info = folders.info(
        options,
        "transformers",
        transformers.__version__,
        context_tokens=min(options.max_context_tokens or loaded.context_tokens, loaded.context_tokens),
        slots=options.max_batch_size or (_CPU_SLOTS if on_cpu else _GPU_SLOTS),
        vocab_size=loaded.vocab_size,
        can_score=head is not None,
        can_generate=loaded.can_generate,
        media=kinds_given("transformers", config.architectures or (), media.modalities if media else ()),
        dtype=str(dtype),
        quantization=[options.quantization_bit, options.quantization_method],
        # The build (+cpu, +cu130) says little about the numbers: a CPU worker may continue a GPU worker's job.
        torch=torch.__version__.split("+")[0],
    )
    return loaded


def _weights(folder: Path, config: Any, device: torch.device, options: TransformersOptions) -> Any:
    if is_classifier(folder):
        kind = transformers.AutoModelForSequenceClassification
    else:
        kind = transformers.AutoModelForMultimodalLM if _is_multimodal(config) else transformers.AutoModelForCausalLM
    more: dict[str, Any] = {}
    if options.flash_attn in _ATTENTION:
        more["attn_implementation"] = _ATTENTION[options.flash_attn]
    if options.quantization_bit is not None:
        more["quantization_config"] = _quantization(options)
    model, report = kind.from_pretrained(
        folder,
        config=config,
        dtype=options.dtype_on(is_cpu=device.type == "cpu"),
        device_map="auto" if device.type == "cuda" else None,
        use_safetensors=None if options.allow_pickle else True,
        trust_remote_code=options.trust_remote_code,
        output_loading_info=True,
        **more,
    )
    if missing := sorted(report["missing_keys"]):  # transformers fills them with chance, and warns
        raise ConfigurationError(
            f"The model {options.shown_name!r} lacks {len(missing)} of its weights: {', '.join(missing[:3])}, …",
            hint="Are all of its files there, and of one version?",
        )
    return model


def _is_multimodal(config: Any) -> bool:
    return config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


def _quantization(options: TransformersOptions) -> Any:
    package = _QUANTIZERS[options.quantization_method]
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            f"quantization_method {options.quantization_method!r} needs the package {package}.",
            hint=f'pip install "tokenfleet[hf]" {package}',
        )
    bits = options.quantization_bit
    match options.quantization_method:
        case "bnb":
            if bits == 8:
                return transformers.BitsAndBytesConfig(load_in_8bit=True)
            return transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            )
        case "hqq":
            return transformers.HqqConfig(nbits=bits)
        case "eetq":
            if bits != 8:
                raise ConfigurationError("eetq quantises to 8 bits only.", hint="Set quantization_bit to 8.")
            return transformers.EetqConfig()


def _refuse_family(config: Any, options: TransformersOptions) -> None:
    """Before the weights are read."""
    if isinstance(why := cell_of("transformers", config.architectures or ()), Refusal):
        raise ConfigurationError(
            f"The transformers engine can't batch {options.shown_name!r}: {why.reason}",
            hint=f"Serve it with vllm or sglang, where these have it. See {why.source}",
        )


def _refuse_unknown_quantisation(config: Any) -> None:
    """transformers only warns, and loads packed weights as if they were plain ones."""
    given = getattr(config, "quantization_config", None)
    if isinstance(given, dict) and not AutoHfQuantizer.supports_quant_method(given):
        method = str(given.get("quant_method", ""))
        raise ValueError(f"transformers {transformers.__version__} doesn't know its quant_method {method!r}.")


def _scale_rope(config: Any, options: TransformersOptions) -> None:
    if options.rope_scaling is None:
        return
    text_config = config.get_text_config()
    text_config.rope_parameters, text_config.max_position_embeddings = scaled(
        getattr(text_config, "rope_parameters", None),
        getattr(text_config, "max_position_embeddings", None),
        options.rope_scaling,
    )


def _refuse_uncached(model: Any, options: TransformersOptions) -> None:
    """Models whose memory of the past is something else than keys and values per token can't join a padded batch."""
    config = model.config.get_text_config()
    foreign = set(getattr(config, "layer_types", None) or ()) - _CACHED_LAYERS
    if getattr(config, "cross_attention_layers", None):  # Mllama keeps an image's keys there, once for all steps
        foreign.add("cross_attention")
    is_decoder = model.can_generate() or hasattr(model, "score")
    if foreign or getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder or not is_decoder:
        what = f"it has layers of type {', '.join(sorted(foreign))}" if foreign else "it is no decoder with a KV cache"
        raise ConfigurationError(
            f"The transformers engine can't batch {options.shown_name!r}: {what}.", hint="Serve it with vllm or sglang."
        )


def _device(options: TransformersOptions) -> torch.device:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device is cuda, but torch sees no GPU.", hint="Leave device at auto, or set cpu.")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def _context_tokens(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048
