"""Media in SGLang: prompts and tensors are made here by the model's own processor, as the transformers engine makes
them, and SGLang gets both ready-made. Its own processors would decode, sample and count in other ways."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput

from tokenfleet.engines.base import Media
from tokenfleet.engines.families import cell_of, kinds_given
from tokenfleet.engines.folders import architectures, has_processor
from tokenfleet.engines.media.failures import invalid
from tokenfleet.engines.media.processing import MediaProcessor, load_processor
from tokenfleet.engines.sglang_engine import compat
from tokenfleet.engines.sglang_engine.options import SglangOptions
from tokenfleet.engines.templates.expansion import Expansion
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.support import Refusal

log = logging.getLogger(__name__)

_FEATURES = {"image": ("pixel_values",), "video": ("pixel_values_videos", "pixel_values"), "audio": ("input_features",)}
_MODALITIES = {"image": Modality.IMAGE, "video": Modality.VIDEO, "audio": Modality.AUDIO}


class SglangMedia:
    """``modalities`` beside text. Its methods block (they decode): call them in a thread."""

    def __init__(self, processor: MediaProcessor, config: Any) -> None:
        """``config``: the model's, of transformers."""
        self._processor = processor
        self._config = config
        self.modalities = kinds_given("sglang", config.architectures, processor.modalities)
        tokenizer = processor.tokenizer
        self._ids = {kind: tokenizer.convert_tokens_to_ids(processor.places[kind]) for kind in self.modalities}

    def expansion(self, media: Sequence[Media]) -> Expansion:
        """Raises `InvalidRequest` for media that can't be decoded or that the model can't take."""
        texts: dict[str, tuple[str, ...]] = {}
        for medium in media:
            texts[medium.kind] = (*texts.get(medium.kind, ()), self._text(medium))
        return Expansion({kind: self._processor.tokens[kind] for kind in self.modalities}, texts)

    def _text(self, medium: Media) -> str:
        return self._processor.prepared([medium]).texts[medium.kind][0]

    def inputs(self, prompt_ids: Sequence[int], delivered_ids: Sequence[int], media: Sequence[Media]) -> Any:
        """SGLang's own form of the prompt. Raises `InvalidRequest`, also for a prompt that has not as many of the
        model's tokens for media as these are written with."""
        spans = {token: iter(_places(prompt_ids, token)) for token in self._ids.values()}
        items = [self._item(medium, spans[self._ids[medium.kind]]) for medium in media]
        if any(next(left, None) is not None for left in spans.values()):
            raise _foreign()
        ids = [*prompt_ids, *delivered_ids]
        output = MultimodalProcessorOutput(
            mm_items=items,
            input_ids=ids,
            # Where a medium stands, ids of its content instead of the model's token: prefixes are told apart by them.
            padded_input_ids=MultimodalProcessorOutput.build_padded_input_ids(ids, items),
            im_token_id=self._ids.get("image"),
            video_token_id=self._ids.get("video"),
            audio_token_id=self._ids.get("audio"),
        )
        if compat.has_grid_positions(self._config):
            positions, delta = compat.grid_positions(self._config, prompt_ids, items)
            # What was delivered is text, whatever its ids are.
            more = positions.max() + 1 + torch.arange(len(delivered_ids))
            output.mrope_positions = torch.cat([positions, more.expand(3, -1)], dim=1)
            output.mrope_position_delta = delta
        return output

    def _item(self, medium: Media, places: Iterator[int]) -> MultimodalDataItem:
        prepared = self._processor.prepared([medium])
        count = prepared.texts[medium.kind][0].count(self._processor.places[medium.kind])
        mine = list(islice(places, count))
        if len(mine) != count:
            raise _foreign()
        inputs: dict[str, Any] = dict(prepared.inputs)
        feature = inputs.pop(next(name for name in _FEATURES[medium.kind] if name in inputs))
        if medium.kind == "audio":
            inputs["audio_feature_lens"] = torch.tensor([count])
        item = MultimodalDataItem(
            modality=_MODALITIES[medium.kind], feature=feature, offsets=_runs(mine), model_specific_data=inputs
        )
        item.set_hash(int.from_bytes(prepared.digest[:8], "big"))
        return item


def media_processor(folder: Path, tokenizer: Any, options: SglangOptions) -> MediaProcessor | None:
    """None for a model of texts, or one whose media SGLang is not given. Raises `ConfigurationError`."""
    if not has_processor(folder):
        return None
    if isinstance(why := cell_of("sglang", architectures(folder)), Refusal):
        log.warning("This model gets texts only. %s Serve it with transformers or vLLM. See %s", why.reason, why.source)
        return None
    return load_processor(folder, tokenizer, options, trust_remote_code=options.trust_remote_code)


class Ready:
    """In the place of SGLang's processor: what `SglangMedia.inputs` made comes as the request's only image."""

    prefer_tokenized_input = True

    async def process_mm_data_async(self, image_data: list[Any], **_: Any) -> Any:
        return image_data[0]


def _places(ids: Sequence[int], wanted: int) -> list[int]:
    return [place for place, token in enumerate(ids) if token == wanted]


def _runs(places: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place - 1:
            runs[-1] = (runs[-1][0], place)
        else:
            runs.append((place, place))
    return runs


def _foreign() -> InvalidRequest:
    return invalid("The prompt has more or fewer of the model's tokens for media than its media are written with.")
