"""Images, videos and audios on the transformers engine, each family against transformers' own ``generate``."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("av")

from tests import media_files as files  # noqa: E402
from tests.contract import small_multimodal as small  # noqa: E402
from tokenfleet.engines.base import Media, Sequence  # noqa: E402
from tokenfleet.engines.generation import resolve_max_new_tokens  # noqa: E402
from tokenfleet.engines.media import MediaSettings  # noqa: E402
from tokenfleet.engines.media.processing import load_processor  # noqa: E402
from tokenfleet.engines.registry import Loaded, ModelSettings, load  # noqa: E402
from tokenfleet.wire.chat import ChatRequest, GenerationParams  # noqa: E402
from tokenfleet.wire.errors import ContextLengthExceeded, InvalidRequest  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

IMAGES = ("llava", "llava_next", "gemma3", "paligemma", "intern_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NEW = 12


@dataclass
class Served:
    family: str
    model: object
    loaded: Loaded
    folder: object

    @property
    def engine(self):
        return self.loaded.engine

    def sequence(self, content, media=(), *, new=NEW, delivered=(), system=None, seed=None, **params):
        """A chat of one user message as the engine gets it; ``content`` has texts and names of kinds of ``media``."""
        request = chat(content, media, system)
        prompt = self.loaded.render(request, tuple(media))
        params = {"do_sample": False, "ignore_eos": True, **params}
        return Sequence(
            sequence_id="s", prompt_ids=prompt.ids, params=GenerationParams(**params), max_new_tokens=new, seed=seed,
            delivered_ids=tuple(delivered), media=tuple(media), prompt_text=prompt.text,
        )  # fmt: skip

    async def answer(self, content, media=(), **more):
        return await self.run(self.sequence(content, media, **more))

    async def run(self, sequence):
        ids = list(sequence.delivered_ids)
        async with aclosing(self.engine.generate(sequence)) as chunks:
            async for chunk in chunks:
                ids += chunk.ids
        return ids

    def generated(self, sequence, inputs=None, new=NEW, **more):
        """What transformers' own loop answers to the same prompt, greedily."""
        processing = self.engine.media
        ids = torch.tensor([sequence.prompt_ids])
        if inputs is None and sequence.media:
            inputs = dict(processing.prepared(sequence.media).inputs)
            inputs.pop("num_patches", None)  # InternVL's processor only counts with it
            name = "token_type_ids" if "gemma" in self.family else "mm_token_type_ids"
            if self.family in (*VIDEOS, "gemma3", "paligemma"):
                inputs[name] = processing.token_types(sequence.prompt_ids)
            if self.family == "paligemma":
                inputs[name].zero_()
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **(inputs or {}), do_sample=False,
                max_new_tokens=new, min_new_tokens=new, eos_token_id=None, **more,
            )  # fmt: skip
        return out[0, ids.shape[1] :].tolist()


def chat(content, media, system=None):
    media = list(media)
    parts = [
        {"type": media.pop(0).kind, "ref": hashlib.sha256(bytes([place])).hexdigest()}
        if part in ("image", "video", "audio")
        else {"type": "text", "text": part}
        for place, part in enumerate(content)
    ]
    return ChatRequest(messages=[{"role": "user", "content": parts}], system=system)


@asynccontextmanager
async def served(family, folder, template=None, **args):
    model = await asyncio.to_thread(small.save, family, folder)
    args = {"model_name_or_path": str(folder), "infer_dtype": "float32", "max_batch_size": 8, **args}
    loaded = await load("transformers", args, ModelSettings("m", template=template))
    try:
        yield Served(family, model, loaded, folder)
    finally:
        await loaded.engine.close()


def media_of(family, *seeds):
    if family == "qwen2_audio":
        return [Media("audio", files.audio_file(seed, seconds=0.3 + seed / 10)) for seed in seeds]
    return [Media("image", files.image_file(seed, (60 + 20 * seed, 44))) for seed in seeds]


@pytest.mark.parametrize("family", [*IMAGES, "qwen2_audio"])
async def test_media_and_text_chats_share_a_batch_and_each_gets_what_it_gets_alone(family, tmp_path):
    kind = "audio" if family == "qwen2_audio" else "image"
    async with served(family, tmp_path, prefill_chunk_tokens=16) as it:
        assert it.engine.info.modalities[:2] == ("text", *it.engine.media.modalities)[:2]
        asked = [
            it.sequence([kind, "What is this?"], media_of(family, 1)),
            it.sequence([kind, "What is this?"], media_of(family, 2)),
            it.sequence(["Compare ", kind, " with ", kind, ", please."], media_of(family, 1, 2)),
            it.sequence(["Hello, how are you today? " * 3]),
            it.sequence(["Hi"]),
        ]
        answers = await asyncio.gather(*(it.run(each) for each in asked))
        expected = [it.generated(each) for each in asked]
        assert answers == expected
        assert answers[0] != answers[1], "what is seen or heard makes no difference"

        # Cut anywhere and continued by another worker, from the stored prompt and the same bytes: the same answer.
        for place, cut in ((2, 1), (0, 7), (2, NEW - 1)):
            assert await it.run(replace(asked[place], delivered_ids=tuple(answers[place][:cut]))) == answers[place]
        # Sampled choices of one request share its media; each is reproducible.
        drawn = {"do_sample": True, "temperature": 1.5, "top_p": 1.0, "top_k": -1}
        seeded = [replace(asked[2], params=GenerationParams(**drawn), seed=seed) for seed in (1, 2, 1)]
        one, other, again = await asyncio.gather(*(it.run(each) for each in seeded))
        assert one == again != other
        searched = replace(asked[0], params=GenerationParams(num_beams=3, do_sample=False, ignore_eos=True))
        assert await it.run(searched) == it.generated(searched, num_beams=3)
        assert (it.engine.running, it.engine.held_tokens) == (0, 0)


async def test_a_text_prompt_that_sees_all_of_itself_is_read_whole_beside_others(tmp_path):
    """PaliGemma's; in chunks, or in one pass with others, it would be read from left to right only."""
    async with served("paligemma", tmp_path, prefill_chunk_tokens=8) as it:
        short, long = it.sequence(["Hi"]), it.sequence(["Hello, how are you today? " * 3])
        beside = it.sequence(["image", "What is this?"], media_of("paligemma", 1), new=2000)
        async with aclosing(it.engine.generate(beside)) as running:
            await anext(running)
            answers = await asyncio.gather(*(it.run(each) for each in (short, long)))
            going_on = await it.run(replace(long, delivered_ids=tuple(answers[1][:5])))
            assert it.engine.running == 1
        assert answers == [it.generated(short), it.generated(long)]
        assert going_on == answers[1]


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "qwen2_audio"])
async def test_prompts_and_tensors_are_those_of_the_models_own_processor(family, tmp_path):
    kind = "audio" if family == "qwen2_audio" else "image"
    async with served(family, tmp_path) as it:
        sequence = it.sequence(["See ", kind, " and ", kind, "?"], media_of(family, 1, 2))
        processor = transformers.AutoProcessor.from_pretrained(it.folder)
        marks = [{"type": kind}, {"type": kind}]
        content = [{"type": "text", "text": "See "}, marks[0], {"type": "text", "text": " and "}, marks[1]]
        text = processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}], add_generation_prompt=True
        )
        if kind == "audio":
            given = {"audio": [sound(0.4, 1), sound(0.5, 2)], "sampling_rate": 16000}
        else:
            given = {"images": [[files.picture(1, (80, 44)), files.picture(2, (100, 44))]]}
        out = processor(text=[text], **given, return_tensors="pt")
        assert tuple(out["input_ids"][0].tolist()) == sequence.prompt_ids
        mine = it.engine.media.prepared(sequence.media).inputs
        assert mine
        for name, value in mine.items():
            torch.testing.assert_close(value, out[name], msg=name)


def sound(seconds, seed):
    from tokenfleet.engines.media import MediaSettings, decode

    return decode([Media("audio", files.audio_file(seed, seconds=seconds))], MediaSettings()).audios[0]


@pytest.mark.parametrize("family", VIDEOS)
async def test_videos_are_seen(family, tmp_path):
    videos = [Media("video", files.video_file(seed)) for seed in (1, 2)]
    async with served(family, tmp_path, video_fps=4.0) as it:
        asked = [
            it.sequence(["video", "What happens?"], videos[:1]),
            it.sequence(["video", "What happens?"], videos[1:]),
            it.sequence(["image", " and ", "video", "?"], [*media_of(family, 1), videos[0]]),
            it.sequence(["Hi"]),
        ]
        answers = await asyncio.gather(*(it.run(each) for each in asked))
        assert answers == [it.generated(each) for each in asked]
        assert answers[0] != answers[1]
        assert await it.run(replace(asked[2], delivered_ids=tuple(answers[2][:5]))) == answers[2]


async def test_named_templates_write_what_llama_factorys_plugins_write(tmp_path):
    async with served("qwen2_vl", tmp_path / "qwen", template="qwen2_vl") as it:
        media = [Media("image", files.image_file(1, (112, 56))), *media_of("qwen2_vl", 2)]
        sequence = it.sequence(["Compare <image> with <image>.", "image", "image"], media)
        counts = [len(text) // len("<|image_pad|>") for text in it.engine.media.prepared(media).texts["image"]]
        assert counts[0] == (112 // 28) * (56 // 28)
        seen = ["<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in counts]
        assert sequence.prompt_text == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\nCompare {seen[0]} with {seen[1]}.<|im_end|>\n<|im_start|>assistant\n"
        )
        pad = it.engine.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert sequence.prompt_ids.count(pad) == sum(counts)
        assert await it.run(sequence) == it.generated(sequence)
    async with served("llava", tmp_path / "llava", template="llava") as it:
        sequence = it.sequence(["image", "What?"], media_of("llava", 1))
        assert f"USER: {'<image>' * 4}What? ASSISTANT:" in sequence.prompt_text  # (28 / 14) ** 2 patches
    async with served("qwen2_audio", tmp_path / "audio", template="qwen2_audio") as it:
        sequence = it.sequence(["audio", "What?"], media_of("qwen2_audio", 1))
        # 0.4 s at a feature each 10 ms: 40 -> 20 -> 10
        assert f"user\n<|audio_bos|>{'<|AUDIO|>' * 10}<|audio_eos|>What?<|im_end|>" in sequence.prompt_text
        with pytest.raises(InvalidRequest, match="the 30 s that this model hears") as caught:
            it.sequence(["audio"], [Media("audio", files.audio_file(1, seconds=30.1))])
        assert caught.value.code == "media_too_large"
        assert it.sequence(["audio"], [Media("audio", files.audio_file(1, seconds=30))])


async def test_what_can_not_be_shown_to_a_model_is_refused_and_hurts_nobody(tmp_path):
    async with served("llava", tmp_path, max_context_tokens=64) as it:
        good = it.sequence(["image", "What is this?"], media_of("llava", 1))
        running = asyncio.create_task(it.run(replace(good, max_new_tokens=30)))
        wrong = {
            "corrupt": (["image"], [Media("image", files.image_file(1)[:150])]),
            "no picture": (["image"], [Media("image", b"hello")]),
            "a sound as a picture": (["image"], [Media("image", files.audio_file(1))]),
            "fewer words": (["<image> and", "image", "image"], media_of("llava", 1, 2)),
            "more words": (["<image><image>", "image"], media_of("llava", 1)),
        }
        for name, (content, media) in wrong.items():
            with pytest.raises(InvalidRequest) as caught:
                it.sequence(content, media)
            assert caught.value.code == "invalid_media", name
        with pytest.raises(InvalidRequest) as caught:  # a token for images that no medium stands behind
            it.loaded.render(chat(["image", "<image> <image>"], media_of("llava", 1)), tuple(media_of("llava", 1)))
        assert caught.value.code == "invalid_media"
        # The engine itself, given bytes that no renderer has seen (a continuation's have not been seen here).
        steps = it.engine.steps
        for kind, data, code in (
            ("image", b"\x89PNG\r\n\x1a\nnonsense", "invalid_media"),
            ("audio", files.audio_file(1), "unsupported_modality"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                await it.run(replace(good, media=(Media(kind, data),)))
            assert caught.value.code == code
        # Expanded tokens count: 14 images of 4 tokens leave no room, and nothing is computed for them.
        long = it.sequence(["image"] * 14, media_of("llava", *[1] * 14))
        with pytest.raises(ContextLengthExceeded):
            resolve_max_new_tokens(long.params, len(long.prompt_ids), it.engine.info.context_tokens)
        with pytest.raises(ContextLengthExceeded):
            await it.run(long)
        assert await running == it.generated(good, new=30)
        assert it.engine.steps - steps < 40


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "intern_vl", "paligemma"])
async def test_a_processor_that_only_writes_a_text_of_its_own_is_asked_for_that(family, tmp_path, monkeypatch):
    """As these do in transformers 5.12."""
    small.save(family, tmp_path)
    plain = processor_of(tmp_path)
    kind = next(each for each in type(plain._processor).__mro__ if "replace_image_token" in vars(each))
    write, call = kind.replace_image_token, kind.__call__

    def called(*args, **named):
        with monkeypatch.context() as then:
            then.setattr(kind, "replace_image_token", write)
            return call(*args, **named)

    monkeypatch.setattr(kind, "replace_image_token", transformers.ProcessorMixin.replace_image_token)
    monkeypatch.setattr(kind, "__call__", called)
    media = media_of(family, 1, 2)
    expected, found = plain, processor_of(tmp_path)
    assert found.tokens["image"] == expected.tokens["image"]
    told = found.prepared(media)
    monkeypatch.undo()
    wanted = expected.prepared(media)
    assert told.texts == wanted.texts
    assert all(torch.equal(told.inputs[name], wanted.inputs[name]) for name in wanted.inputs)


def processor_of(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return load_processor(folder, tokenizer, MediaSettings(), trust_remote_code=False)


async def test_an_image_token_without_its_image_fails_alone(tmp_path):
    async with served("llava", tmp_path) as it:
        good = it.sequence(["image", "What is this?"], media_of("llava", 1))
        # As a request from a release that counts otherwise: one image token too many for the media.
        token = it.engine.tokenizer.convert_tokens_to_ids("<image>")
        from tokenfleet.wire.errors import EngineError

        results = await asyncio.gather(
            it.run(good), it.run(replace(good, prompt_ids=(token, *good.prompt_ids))), it.run(good),
            return_exceptions=True,
        )  # fmt: skip
        assert isinstance(results[1], InvalidRequest | EngineError)
        assert results[0] == results[2] == it.generated(good)
        await it.engine.check()


@pytest.mark.parametrize(
    ("family", "template", "written"),
    [
        ("gemma3", "gemma3", "user\n\n\n<start_of_image>{}<end_of_image>\n\nWhat?<end_of_turn>"),
        ("intern_vl", "intern_vl", "user\n<img>{}</img>What?<|im_end|>"),
        ("llava_next", "llava_next", "USER: {}What? ASSISTANT:"),
        ("qwen2_5_vl", "qwen2_vl", "user\n<|vision_start|>{}<|vision_end|>What?<|im_end|>"),
        ("qwen3_vl", "qwen3_vl", "user\n<|vision_start|>{}<|vision_end|>What?<|im_end|>"),
        ("paligemma", "paligemma", "{}"),
    ],
)
async def test_every_plugins_frame_stands_around_its_tokens(family, template, written, tmp_path):
    from tokenfleet.engines.media import MediaSettings
    from tokenfleet.engines.media.processing import load_processor
    from tokenfleet.engines.prompts import renderer

    small.save(family, tmp_path)
    plain = transformers.AutoTokenizer.from_pretrained(tmp_path)
    processing = load_processor(tmp_path, plain, MediaSettings(), trust_remote_code=False)
    render = renderer(processing.tokenizer, template=template, expansion_of=processing.expansion)
    media = tuple(media_of(family, 1))
    prompt = render(chat(["image", "What?"], media), media)
    token = "<image_soft_token>" if family == "gemma3" else processing.tokens["image"]
    count = prompt.text.count(token)
    assert count >= 2
    assert written.format(token * count) in prompt.text
    assert prompt.ids.count(processing.tokenizer.convert_tokens_to_ids(token)) == count
    if family == "paligemma":  # all images before everything else
        assert prompt.text.startswith(token * count)
        assert "What?" in prompt.text
