"""Images, videos and audios: the same prompt, the same answer and the same refusals on every engine, against
transformers' own ``generate``. Media settings are others than the defaults here, and each must be seen to matter.

``TOKENFLEET_CONTRACT_ENGINES`` names the engines, as for the other suite. An engine takes half a minute to start, so
each model is started once, and all that is asked of it goes through one batch."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import re
from contextlib import aclosing
from dataclasses import dataclass, replace

import pytest
import pytest_asyncio

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("av")

from tests import media_files as files  # noqa: E402
from tests.contract import small_multimodal as small  # noqa: E402
from tests.contract.subjects import SGLANG_ON_GPU, multiply_in_full  # noqa: E402
from tests.contract.test_media import chat  # noqa: E402
from tokenfleet.engines.base import Media, Sequence  # noqa: E402
from tokenfleet.engines.families import cell_of  # noqa: E402
from tokenfleet.engines.generation import resolve_max_new_tokens  # noqa: E402
from tokenfleet.engines.media import MediaSettings  # noqa: E402
from tokenfleet.engines.media.processing import MediaProcessor, load_processor  # noqa: E402
from tokenfleet.engines.prompts import RenderedPrompt, renderer  # noqa: E402
from tokenfleet.engines.registry import Loaded, ModelSettings, load  # noqa: E402
from tokenfleet.engines.support import CONTINUATION  # noqa: E402
from tokenfleet.wire.chat import GenerationParams  # noqa: E402
from tokenfleet.wire.errors import ConfigurationError, ContextLengthExceeded, InvalidRequest  # noqa: E402
from tokenfleet.wire.support import Refusal  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

ENGINES = [
    name
    for name in os.environ.get("TOKENFLEET_CONTRACT_ENGINES", "scripted,transformers").split(",")
    if name != "scripted" and importlib.util.find_spec(name)
]
FAMILIES = ["llava_next", "qwen2_vl", "qwen2_audio"]
"""LLaVA is what real workers are held to, in tests/integration/test_engines_media_worker.py."""
MORE = {"vllm": ["qwen2_5_vl"]}  # whose videos have a test of their own
ON_GPU = torch.cuda.is_available()
READS_BOTH_WAYS = {
    ("sglang", "gemma3"): {"sglang_config": {"chunked_prefill_size": 64}},
    ("sglang", "paligemma"): {"sglang_config": {"disable_radix_cache": False}},
    **({} if ON_GPU else {("vllm", "gemma3"): {"vllm_config": {"enable_prefix_caching": True}}}),
}
"""And what of their engines' own options can't be had with them."""
CASES = [(engine, family) for engine in ENGINES for family in FAMILIES + MORE.get(engine, [])]
TOLERANCE = {"sglang": 0.3} if ON_GPU else {}
"""In logits, where it isn't 1e-3: on a GPU SGLang's kernels take 16 bits only. Another medium, or the same at another
place, moves these models by several logits."""
RATE = 32000
SETTINGS = {
    "image_max_pixels": 80 * 80, "image_min_pixels": 50 * 50, "video_max_pixels": 60 * 60, "video_min_pixels": 56 * 56,
    "video_fps": 4.0, "video_maxlen": 6,
}  # fmt: skip
LONG = {"image_max_pixels": 700 * 300, "video_fps": 4.0}
BRIEFLY = {
    "gemma3": LONG | {"image_do_pan_and_scan": True},
    "intern_vl": LONG | {"crop_to_patches": True},
    "llava_next_video": LONG,
    "paligemma": LONG,
    "qwen2_5_vl": SETTINGS,
    "qwen3_vl": SETTINGS,
}
"""Further families, of which no more is asked than whether they see; and the settings that they are loaded with."""
BY_HAND = frozenset({"llava_next_video"})  # with TOKENFLEET_BY_HAND=1: an engine takes long to start
CUTS = frozenset({"image_do_pan_and_scan", "crop_to_patches"})
NEW = 12
ROOM = 512


@dataclass
class Served:
    engine_name: str
    family: str
    model: object
    loaded: Loaded
    plain: MediaProcessor
    """What transformers makes of media by the same settings; ``defaults`` by the default ones."""
    defaults: MediaProcessor

    @property
    def engine(self):
        return self.loaded.engine

    def media(self, kind, *seeds):
        make = {
            "image": lambda seed: files.image_file(seed, (60 + 60 * seed, 88)),
            "video": lambda seed: files.video_file(seed, frames=20 + 10 * seed),
            "audio": lambda seed: files.audio_file(seed, seconds=0.3 + seed / 10),
        }
        return [Media(kind, make[kind](seed)) for seed in seeds]

    async def asked(self, content, media=(), **more):
        prompt = await asyncio.to_thread(self.loaded.render, chat(content, media), tuple(media))
        return prompt, Sequence(
            "s", prompt.ids, self.params(do_sample=False), NEW, media=tuple(media), prompt_text=prompt.text, **more
        )

    @property
    def barred(self):
        """The model's own tokens for media: in an answer the plain model would take them for media."""
        tokens = {*self.plain.tokens.values(), *self.plain.places.values()}
        return self.plain.tokenizer.convert_tokens_to_ids(sorted(tokens))

    def params(self, **values):
        return GenerationParams(ignore_eos=True, logit_bias=dict.fromkeys(self.barred, -100.0), **values)

    @property
    def tolerance(self):
        return TOLERANCE.get(self.engine_name, 1e-3)

    def is_as_good(self, ids, others, prompt, media):
        """Whether ``others`` is the same answer; where rounding may choose between two, as good a one."""
        return ids == others or (self.tolerance > 1e-3 and self.gap(prompt, media, others) < self.tolerance)

    async def run(self, sequence):
        ids = list(sequence.delivered_ids)
        async with aclosing(self.engine.generate(sequence)) as chunks:
            async for chunk in chunks:
                ids += chunk.ids
        return ids

    def expected(self, content, media, plain=None) -> RenderedPrompt:
        """The prompt as transformers reads it, media written out."""
        plain = plain or self.plain
        return renderer(plain.tokenizer, expansion_of=plain.expansion)(chat(content, media), tuple(media))

    def gap(self, prompt: RenderedPrompt, media, ids) -> float:
        """By how much any of ``ids`` was not the best after what stands before it."""
        given = torch.tensor([[*prompt.ids, *ids]])
        inputs = dict(self.plain.prepared(media).inputs) if media else {}
        inputs.pop("num_patches", None)  # InternVL's processor only counts with it
        types = self.plain.token_types(prompt.ids)
        if self.family == "paligemma":  # 0: read in both directions
            types = torch.zeros_like(types)
            inputs["token_type_ids"] = torch.cat([types, torch.ones(1, len(ids), dtype=types.dtype)], dim=1)
        elif (self.family == "gemma3" or "qwen" in self.family) and "audio" not in self.family:
            name = "token_type_ids" if self.family == "gemma3" else "mm_token_type_ids"
            inputs[name] = torch.cat([types, torch.zeros(1, len(ids), dtype=types.dtype)], dim=1)
        with torch.inference_mode():
            logits = self.model(input_ids=given, attention_mask=torch.ones_like(given), **inputs).logits[0]
        logits = logits[len(prompt.ids) - 1 : -1].clone()
        logits[:, self.barred] -= 100
        return (logits.max(-1).values - logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]).max().item()


def arguments(engine_name, folder):
    dtype = "float16" if ON_GPU and engine_name == "sglang" else "float32"
    args = {"model_name_or_path": str(folder), "infer_dtype": dtype, "max_batch_size": 8}
    if engine_name == "transformers":
        return args | {"max_context_tokens": ROOM}
    if engine_name == "vllm":
        return args | {
            "vllm_enforce_eager": True, "vllm_maxlen": ROOM, "vllm_config": {"kv_cache_memory_bytes": 1 << 27},
            **({"vllm_gpu_util": 0.1} if ON_GPU else {}),
        }  # fmt: skip
    return args | {"sglang_maxlen": ROOM, "sglang_config": SGLANG_ON_GPU if ON_GPU else {}}


def save(family, folder):
    sizes = {"head_dim": 32}  # vLLM's least on a CPU
    model = small.save(family, folder, **sizes, **({"rate": RATE} if family == "qwen2_audio" else {}))
    if family != "intern_vl":
        small.as_on_the_hub(folder)
    if family in ("qwen2_vl", "qwen2_5_vl") and has_torchvision():
        videos = transformers.Qwen2VLVideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112})
        videos.save_pretrained(folder)
    return model


def processor(folder, **settings):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made = load_processor(folder, tokenizer, MediaSettings(**settings), trust_remote_code=False)
    if made is None:
        pytest.skip(f"transformers {transformers.__version__} has no processor of this family that can be used")
    return made


def has_torchvision():
    try:
        import torchvision
    except ImportError:
        return False
    return torchvision.__version__ != "0"  # tests/sglang_cpu's


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=CASES, ids="-".join)
async def it(request, tmp_path_factory):
    engine_name, family = request.param
    if engine_name != "transformers" and family != "qwen2_audio" and not has_torchvision():
        pytest.skip(f"models that see need torchvision in {engine_name}: `make setup-{engine_name}-cpu`")
    folder = tmp_path_factory.mktemp(family)
    if engine_name == "vllm":
        multiply_in_full()
    model = await asyncio.to_thread(save, family, folder)
    settings = SETTINGS | ({"audio_sampling_rate": RATE} if family == "qwen2_audio" else {})
    loaded = await load(engine_name, {**arguments(engine_name, folder), **settings}, ModelSettings("m"))
    try:
        defaults = {"audio_sampling_rate": RATE} if family == "qwen2_audio" else {}
        both = (processor(folder, **each) for each in (settings, defaults))
        yield Served(engine_name, family, model, loaded, *both)
    finally:
        await loaded.engine.close()


async def test_media_are_seen_and_heard_as_transformers_does(it):
    kinds = it.plain.modalities
    assert it.engine.info.modalities == ("text", *kinds)
    contents = [(["Hello, how are you?"], [])]
    for kind in kinds:
        one, other = it.media(kind, 1, 2)
        contents += [
            ([kind, "What is this?"], [one]),
            ([kind, "What is this?"], [other]),
            (["Compare ", kind, " with ", kind, ", please."], [one, other]),
        ]
    if len(kinds) > 1:
        contents.append(([kinds[0], " and ", kinds[1], "?"], [*it.media(kinds[0], 1), *it.media(kinds[1], 2)]))
    asked = [await it.asked(*content) for content in contents]
    answers = await asyncio.gather(*(it.run(sequence) for _, sequence in asked))
    for (content, media), (prompt, _), ids in zip(contents, asked, answers, strict=True):
        expected = it.expected(content, media)
        assert prompt.tokens == len(expected.ids)
        if it.engine_name != "vllm":  # which writes media out by itself
            assert prompt.ids == expected.ids
        assert len(ids) == NEW
        assert it.gap(expected, media, ids) < it.tolerance
    assert answers[1] != answers[2], "what is seen or heard makes no difference"
    # Taken over by another worker, with the stored prompt, what was delivered, and the same bytes.
    for (content, media), (_, sequence), ids in list(zip(contents, asked, answers, strict=True))[3:]:
        for cut in (1, 7):
            again = await it.run(replace(sequence, delivered_ids=tuple(ids[:cut])))
            assert again[:cut] == ids[:cut]
            assert it.is_as_good(ids, again, it.expected(content, media), media)
    # The same again, when an engine may have kept what it computed for the media.
    again = await it.run(asked[1][1])
    assert it.is_as_good(answers[1], again, it.expected(*contents[1]), contents[1][1])
    drawn = replace(asked[3][1], params=it.params(temperature=1.5, top_p=1.0, top_k=-1))
    one, other, again = await asyncio.gather(*(it.run(replace(drawn, seed=seed)) for seed in (1, 2, 1)))
    assert one != other
    assert one == again or ON_GPU
    cut = await it.run(replace(drawn, seed=1, delivered_ids=tuple(one[:5])))
    is_exact = CONTINUATION[it.engine_name].get("seed") != "valid" and not ON_GPU
    assert cut == one or (not is_exact and cut[:5] == one[:5])
    form = GenerationParams(do_sample=False, response_format={"type": "regex", "pattern": "[ab]{9}"})
    shaped = replace(asked[3][1], params=form, max_new_tokens=20, eos_ids=frozenset({1}))
    ids = await it.run(shaped)
    assert re.fullmatch("[ab]{9}", it.plain.tokenizer.decode(ids, skip_special_tokens=True))
    again = await it.run(replace(shaped, delivered_ids=tuple(ids[:3])))
    assert again == ids or (
        ON_GPU and re.fullmatch("[ab]{9}", it.plain.tokenizer.decode(again, skip_special_tokens=True))
    )


@pytest.mark.parametrize("it", [case for case in CASES if case == ("vllm", "qwen2_5_vl")], ids="-".join, indirect=True)
async def test_a_vllm_that_does_not_know_a_videos_rate_is_told(it, monkeypatch):
    """As 0.26 does with whatever it is told, the one of this environment takes 24 frames a second."""
    from tokenfleet.engines.vllm_engine import media

    plainly = media._video
    monkeypatch.setattr(media, "_video", lambda video: (plainly(video)[0], {**plainly(video)[1], "fps": 24.0}))
    for seed in (3, 4):
        content = (["video", "What is this?"], it.media("video", seed))
        ids = await it.run((await it.asked(*content))[1])
        assert it.gap(it.expected(*content), content[1], ids) < it.tolerance


async def test_a_penalty_counts_what_a_text_has_and_not_what_an_image_is_told_apart_by(it):
    kind = it.plain.modalities[0]
    _, sequence = await it.asked([kind, "What is this?"], it.media(kind, 1))
    barred = it.params(do_sample=False, frequency_penalty=2.0, repetition_penalty=8.0)
    ids = await it.run(replace(sequence, params=barred))
    assert len(ids) == NEW
    assert len(set(ids)) == NEW
    again = await it.run(replace(sequence, params=barred, delivered_ids=tuple(ids[:5])))
    assert again == ids or (ON_GPU and len(set(again)) == NEW)


async def test_settings_matter(it):
    """Each by what the model is given: that the answers follow from it is shown above."""
    for kind in it.plain.modalities:
        [medium] = it.media(kind, 2)
        mine, default = (len(it.expected([kind], [medium], plain).ids) for plain in (it.plain, it.defaults))
        prompt, _ = await it.asked([kind], [medium])
        assert prompt.tokens == mine
        if "llava" in it.family:  # sees all images in sizes of its own
            continue
        if kind == "audio":
            frames = int(0.5 * RATE) // 160
            assert prompt.tokens == len(it.expected([], []).ids) + (frames // 2) // 2 + 2
        else:
            assert mine != default


async def test_what_can_not_be_shown_to_a_model_is_refused_and_hurts_nobody(it):
    kind = it.plain.modalities[0]
    other = "audio" if kind == "image" else "image"
    one, two = it.media(kind, 1, 2)
    _, good = await it.asked([kind, "What is this?"], [one])
    running = asyncio.create_task(it.run(replace(good, max_new_tokens=40)))
    word = f"<{kind}>"
    wrong = {
        "corrupt": ([kind], [Media(kind, one.data[:150])] if kind == "image" else [Media(kind, b"RIFF" + bytes(99))]),
        "no medium": ([kind], [Media(kind, b"hello")]),
        "fewer words": ([f"{word} and", kind, kind], [one, two]),
        "more words": ([word * 2, kind], [one]),
        "the model's own token": ([f"{it.plain.tokens[kind] * 2} and", kind], [one]),
    }
    for foreign in set(it.plain.modalities) - {kind}:
        wrong["its token for another kind"] = ([f"{it.plain.tokens[foreign]} and", kind], [one])
    for name, (content, media) in wrong.items():
        with pytest.raises(InvalidRequest) as caught:
            await it.asked(content, media)
        assert caught.value.code == "invalid_media", name
    # The engine itself, with bytes that no renderer has seen here: a continuation's.
    for medium, code in ((Media(kind, b"hello"), "invalid_media"), (Media(other, one.data), "unsupported_modality")):
        with pytest.raises(InvalidRequest) as caught:
            await it.run(replace(good, media=(medium,)))
        assert caught.value.code == code
    # What media are written out to counts.
    many = 2 + ROOM // max(1, it.expected([kind], [one]).tokens - it.expected(["x"], []).tokens)
    long, sequence = await it.asked([kind] * many, [one] * many)
    assert long.tokens > ROOM
    with pytest.raises(ContextLengthExceeded):
        resolve_max_new_tokens(sequence.params, long.tokens, it.engine.info.context_tokens)
    with pytest.raises(ContextLengthExceeded):
        await it.run(sequence)
    # To the last token that fits and no further.
    prompt, sequence = await it.asked([kind, "What is this?"], [one])
    room = it.engine.info.context_tokens - prompt.tokens
    assert len(await it.run(replace(sequence, max_new_tokens=room))) == room
    with pytest.raises(ContextLengthExceeded):
        await it.run(replace(sequence, max_new_tokens=room + 1))
    with pytest.raises(ContextLengthExceeded):
        await it.run(replace(sequence, max_new_tokens=room + 1, delivered_ids=tuple(range(40, 48))))
    assert len(await running) == 40
    await it.engine.check()


def in_brief(engine_name, family):
    if engine_name == "transformers" and not CUTS & BRIEFLY[family].keys():
        return False  # tests/contract/test_media.py has it
    return (engine_name, family) not in CASES and (family not in BY_HAND or "TOKENFLEET_BY_HAND" in os.environ)


@pytest.mark.parametrize(
    ("engine_name", "family"), [case for case in itertools.product(ENGINES, BRIEFLY) if in_brief(*case)]
)
async def test_more_families_see_as_transformers_does_also_images_that_are_cut(engine_name, family, tmp_path):
    settings = BRIEFLY[family]
    if engine_name != "transformers" and not has_torchvision():
        pytest.skip(f"models that see need torchvision in {engine_name}: `make setup-{engine_name}-cpu`")
    if engine_name == "vllm":
        multiply_in_full()
    model = await asyncio.to_thread(save, family, tmp_path)
    started = load(engine_name, {**arguments(engine_name, tmp_path), **settings}, ModelSettings("m"))
    if isinstance(why := cell_of(engine_name, [type(model).__name__]), Refusal):
        with pytest.raises(ConfigurationError) as refused:
            await started
        assert why.reason in refused.value.message
        return
    loaded = await started
    try:
        plain = (processor(tmp_path, **each) for each in (settings, LONG))
        it = Served(engine_name, family, model, loaded, *plain)
        kinds = it.engine.info.modalities
        one, other = (Media("image", files.image_file(seed, (600, 260))) for seed in (1, 2))
        film, last = (Media("video", files.video_file(seed, frames=12)) for seed in (1, 2))
        contents = [
            (["image", "What is this?"], [one]),
            (["image", "What is this?"], [other]),
            (["video", "What happens?"], [film]),
            (["video", "What happens?"], [last]),
            (["Is ", "image", " more than ", "image", "?"], [one, other]),
            (["Is ", "video", " or ", "image", " or ", "video", " last?"], [film, one, last]),
            (["Hello, how are you?"], []),
        ]
        contents = [each for each in contents if all(medium.kind in kinds for medium in each[1])]
        asked = [await it.asked(*content) for content in contents]
        answers = await asyncio.gather(*(it.run(sequence) for _, sequence in asked))
        for content, (prompt, _), ids in zip(contents, asked, answers, strict=True):
            expected = it.expected(*content)
            assert prompt.tokens == len(expected.ids)
            if CUTS & settings.keys() and content[1] == [one]:
                assert prompt.tokens > len(it.expected(*content, it.defaults).ids)
            assert len(ids) == NEW
            assert it.gap(expected, content[1], ids) < it.tolerance, content
        assert answers[0] != answers[1]
        for content, (_, sequence), ids in list(zip(contents, asked, answers, strict=True))[1:]:  # taken over
            again = await it.run(replace(sequence, delivered_ids=tuple(ids[:5])))
            assert it.is_as_good(ids, again, it.expected(*content), content[1])
    finally:
        await loaded.engine.close()
    if wrong := READS_BOTH_WAYS.get((engine_name, family)):
        with pytest.raises(ConfigurationError, match="which attends to tokens that come later"):
            await load(engine_name, arguments(engine_name, tmp_path) | wrong, ModelSettings("m"))


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("qwen2_audio", {"audio_sampling_rate": 16000}),
        ("llava", {"image_do_pan_and_scan": True}),
        ("llava", {"crop_to_patches": True}),
        ("llava", {"use_audio_in_video": True}),
    ],
    ids=str,
)
async def test_a_setting_that_a_model_can_not_honour_is_refused_at_the_start(engine_name, family, setting, tmp_path):
    await asyncio.to_thread(save, family, tmp_path)
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        await load(engine_name, {**arguments(engine_name, tmp_path), **setting}, ModelSettings("m"))
