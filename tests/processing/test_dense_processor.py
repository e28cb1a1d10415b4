"""The processor of a dense model becomes VLMoE's: same tokens, same pixels."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from vlmoe.processing.dense_processor import add_image_token
from vlmoe.processing.processing_vlmoe import DEFAULT_CHAT_TEMPLATE, VLMoEProcessor

TEMPLATE = "{% for message in messages %}USER: {{ message.content }} ASSISTANT:{% endfor %}"
SIZES = [(24, 20), (16, 16), (40, 20), (9, 33), (60, 16), (3, 2)]  # width, height
IDEFICS3_TOKENS = ("<fake_token_around_image>", "<end_of_utterance>", "<row_5_col_1>")
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
GOT_OCR2 = {  # as torchvision's class of transformers 4 wrote it
    "crop_size": None,
    "crop_to_patches": False,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "max_patches": 12,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "return_tensors": None,
    "size": {"height": 16, "width": 16},
}
SMOLVLM = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SmolVLMImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": 16},
    "processor_class": "SmolVLMProcessor",
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 48},
    "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 16}},
}
LLAVA_IMAGES = {
    "clip": CLIPImageProcessorPil(
        size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}
    ),
    "clip, own statistics": CLIPImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        resample=2,
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
    ),
    "llava, padded to a square": LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ),
    "siglip": SiglipImageProcessorPil(size={"height": 16, "width": 16}),
}


@pytest.fixture
def pictures(make_image) -> list[Image.Image]:
    """Pictures of several sizes and modes, with edges that resampling filters treat unlike."""
    return [
        *(make_image(seed, size) for seed, size in enumerate(SIZES)),
        make_image(7, (20, 30), "RGBA"),
        make_image(8, (20, 30), "L"),
    ]


@pytest.fixture
def llava_config(tiny_config):
    """The configuration of a converted Llava model with a CLIP or a SigLIP tower."""

    def make(kind: str) -> Any:
        if kind == "siglip":
            return tiny_config(pixel_shuffle_factor=1)
        return tiny_config(
            vision={"model_type": "clip_vision_model"},
            vision_feature_select_strategy="default",
            pixel_shuffle_factor=1,
        )

    return make


@pytest.fixture
def idefics3_config(tiny_config):
    return tiny_config(vision={"model_type": "idefics3_vision"}, text={"vocab_size": 400})


@pytest.fixture
def internvl_source(hub_folder, with_tokens, tiny_config):
    """`internvl_source(**image processor fields)`: a folder as on the Hub, and its config."""

    def make(**fields: Any) -> tuple[Path, Any]:
        tokenizer = with_tokens(INTERNVL_TOKENS.values())
        extra = {"extra_special_tokens": INTERNVL_TOKENS, "padding_side": None}
        files = {
            "preprocessor_config.json": GOT_OCR2 | fields,
            "processor_config.json": {
                "image_seq_length": 4,
                "processor_class": "InternVLProcessor",
            },
            "chat_template.jinja": TEMPLATE,
        }
        config = tiny_config(
            vision={"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
            text={"vocab_size": 400},
            vision_feature_select_strategy="default",
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        )
        return hub_folder(tokenizer, extra, **files), config

    return make


@pytest.fixture
def smolvlm_source(hub_folder, with_tokens, tiny_config):
    """`smolvlm_source(**image processor fields)`: a folder as on the Hub, and its config."""

    def make(**fields: Any) -> tuple[Path, Any]:
        files = {
            "preprocessor_config.json": SMOLVLM | fields,
            "processor_config.json": {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"},
            "chat_template.json": {"chat_template": TEMPLATE},
        }
        config = tiny_config(vision={"model_type": "smolvlm_vision"}, text={"vocab_size": 400})
        return hub_folder(
            with_tokens(IDEFICS3_TOKENS), {"truncation_side": "left"}, **files
        ), config

    return make


def real_tiles(output: Any) -> torch.Tensor:
    """(real tiles of the batch, 3, H, W)."""
    return output["pixel_values"][output["pixel_attention_mask"].flatten(2).any(-1)]


def text_ids(processor: VLMoEProcessor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def check_reloads(processor: VLMoEProcessor, folder: Path, call: dict[str, Any]) -> None:
    """Saved and loaded, the processor does the same."""
    processor.save_pretrained(folder)
    loaded = VLMoEProcessor.from_pretrained(folder)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.padding_side == processor.tokenizer.padding_side
    wanted, output = processor(**call), loaded(**call)
    assert set(output) == set(wanted)
    assert all(torch.equal(output[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", LLAVA_IMAGES)
@pytest.mark.parametrize("given", ["folder", "old folder", "processor", "pair"])
def test_llava_gives_the_sources_tokens_and_pixels(
    kind, given, tokenizer, llava_config, hub_folder, pictures, tmp_path
):
    image_processor, is_clip = LLAVA_IMAGES[kind], kind != "siglip"
    theirs = LlavaProcessor(
        image_processor,
        copy.deepcopy(tokenizer),
        patch_size=4,
        vision_feature_select_strategy="default" if is_clip else "full",
        chat_template=TEMPLATE,
        num_additional_image_tokens=int(is_clip),
    )
    if given == "folder":
        source = tmp_path / "new"
        theirs.save_pretrained(source)
    elif given == "old folder":  # no patch size: it was added to the Hub's files later
        name = type(image_processor).__name__.removesuffix("Pil")
        fields = image_processor.to_dict() | {"image_processor_type": name}
        fields |= {"processor_class": "LlavaProcessor"}
        files = {"preprocessor_config.json": fields, "chat_template.jinja": TEMPLATE}
        source = hub_folder(tokenizer, **files)
    else:
        source = theirs if given == "processor" else (image_processor, tokenizer)
    ours = VLMoEProcessor.from_dense(source, llava_config(kind))
    text = ["a<image>b<image>" + "<image>" * (len(pictures) - 3), "<image>wörd"]
    call = {"text": text, "padding": True, "return_tensors": "pt"}
    reference, output = theirs(images=pictures, **call), ours(images=pictures, **call)
    assert torch.equal(output["input_ids"], reference["input_ids"])
    assert torch.equal(output["attention_mask"], reference["attention_mask"])
    assert torch.equal(real_tiles(output), reference["pixel_values"])
    assert ours.chat_template == (DEFAULT_CHAT_TEMPLATE if given == "pair" else TEMPLATE)
    check_reloads(ours, tmp_path / "ours", {"images": pictures, **call})


@pytest.mark.parametrize("given", ["folder", "old folder", "processor", "pair"])
@pytest.mark.parametrize("splitting", [True, False])
def test_idefics3_gives_the_sources_tokens_pixels_and_mask(
    given, splitting, with_tokens, idefics3_config, hub_folder, pictures, tmp_path
):
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 48},
        max_image_size={"longest_edge": 16},
        do_image_splitting=splitting,
    )
    tokenizer = with_tokens(IDEFICS3_TOKENS[:1])  # the source's class adds <end_of_utterance>
    theirs = Idefics3Processor(image_processor, copy.deepcopy(tokenizer), 4, TEMPLATE)
    source: Any = theirs if given == "processor" else (image_processor, tokenizer)
    if given == "folder":
        source = tmp_path / "new"
        theirs.save_pretrained(source)
    elif given == "old folder":
        fields = image_processor.to_dict() | {"image_processor_type": "Idefics3ImageProcessor"}
        settings = {"image_seq_len": 4, "processor_class": "Idefics3Processor"}
        files = {"preprocessor_config.json": fields, "processor_config.json": settings}
        source = hub_folder(
            tokenizer, **files, **{"chat_template.json": {"chat_template": TEMPLATE}}
        )
    ours = VLMoEProcessor.from_dense(source, idefics3_config)
    images = [pictures[:2], pictures[2:3], [], pictures[3:]]
    texts = ["a<image>b\n<image>", "<image>\n\n", "no image<end_of_utterance>"]
    texts.append("<image>" * len(pictures[3:]))
    call = {"images": images, "text": texts, "padding": True, "return_tensors": "pt"}
    reference, output = theirs(**call), ours(**call)
    for name in ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"):
        assert torch.equal(output[name], reference[name]), name
    assert not splitting or output["pixel_values"].shape[1] > 9
    sizes = [(image.height, image.width) for image in pictures]
    planned = ours._get_num_multimodal_tokens(sizes).num_image_tokens
    alone = [theirs(images=image, text="<image>")["input_ids"][0] for image in pictures]
    assert planned == [len(ids) for ids in alone]
    check_reloads(ours, tmp_path / "ours", call)


I4 = "<image><image><image><image>"
FAKE = "<fake_token_around_image>"
WHOLE = f"{FAKE}<global-img>{I4}{FAKE}"
SMOLVLM_GOLDEN = [
    # longest edge after resizing, (width, height) of each image, text of each image
    (16, [(16, 16)], [WHOLE]),
    (32, [(32, 16)], [f"{FAKE}<row_1_col_1>{I4}{FAKE}<row_1_col_2>{I4}\n\n{WHOLE}"]),
    (
        48,
        [(30, 48)],
        [
            f"{FAKE}<row_1_col_1>{I4}{FAKE}<row_1_col_2>{I4}\n"
            f"{FAKE}<row_2_col_1>{I4}{FAKE}<row_2_col_2>{I4}\n"
            f"{FAKE}<row_3_col_1>{I4}{FAKE}<row_3_col_2>{I4}\n"
            f"\n{WHOLE}"
        ],
    ),
    (
        32,
        [(32, 16), (16, 64)],
        [
            f"{FAKE}<row_1_col_1>{I4}{FAKE}<row_1_col_2>{I4}\n\n{WHOLE}",
            f"{FAKE}<row_1_col_1>{I4}\n{FAKE}<row_2_col_1>{I4}\n\n{WHOLE}",
        ],
    ),
]


@pytest.mark.parametrize(("longest", "sizes", "golden"), SMOLVLM_GOLDEN)
def test_smolvlm_gives_the_documented_text_and_its_image_processors_pixels(
    longest, sizes, golden, smolvlm_source, make_image, tmp_path
):
    folder, config = smolvlm_source(size={"longest_edge": longest})
    ours = VLMoEProcessor.from_dense(folder, config)
    images = [make_image(seed, size) for seed, size in enumerate(sizes)]
    text = "a" + "<image>b" * len(images)
    call = {"images": images, "text": text, "return_tensors": "pt"}
    output = ours(**call)
    wanted = "a" + "".join(f"{image}b" for image in golden)
    assert output["input_ids"].tolist() == [text_ids(ours, wanted)]
    reference = SmolVLMImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": 16}
    )([images], return_tensors="pt")
    assert torch.equal(output["pixel_values"], reference["pixel_values"])
    assert torch.equal(output["pixel_attention_mask"], reference["pixel_attention_mask"])
    whole = ours(images=images, text=text, do_image_splitting=False)
    assert whole["input_ids"] == [text_ids(ours, "a" + f"{WHOLE}b" * len(images))]
    counts = ours._get_num_multimodal_tokens([(height, width) for width, height in sizes])
    assert counts.num_image_tokens == [len(text_ids(ours, image)) for image in golden]
    assert ours.chat_template == TEMPLATE and ours.tokenizer.truncation_side == "left"
    check_reloads(ours, tmp_path / "ours", call)


C4 = "<IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT>"
INTERNVL_GOLDEN = [
    ([(16, 16)], [f"<img>{C4}</img>"]),
    ([(32, 16)], [f"<img>{C4}{C4}{C4}</img>"]),
    ([(32, 48)], [f"<img>{C4}{C4}{C4}{C4}{C4}{C4}{C4}</img>"]),
    ([(48, 16), (9, 9)], [f"<img>{C4}{C4}{C4}{C4}</img>", f"<img>{C4}</img>"]),
]


@pytest.mark.parametrize(("sizes", "golden"), INTERNVL_GOLDEN)
def test_internvl_gives_the_documented_text_and_its_image_processors_pixels(
    sizes, golden, internvl_source, make_image, tmp_path
):
    folder, config = internvl_source()
    ours = VLMoEProcessor.from_dense(folder, config)
    images = [make_image(seed, size) for seed, size in enumerate(sizes)]
    text = "a" + "<IMG_CONTEXT>\nb" * len(images)
    call = {"images": images, "text": [text, "c"], "padding": True, "return_tensors": "pt"}
    output = ours(**call)
    wanted = text_ids(ours, "a" + "".join(f"{image}\nb" for image in golden))
    assert output["input_ids"][0].tolist() == wanted
    assert output["input_ids"][1, 0] == ours.tokenizer.pad_token_id  # InternVL pads on the left
    fields = {name: GOT_OCR2[name] for name in ("image_mean", "image_std", "resample", "size")}
    reference = GotOcr2ImageProcessorPil(**fields)(images, crop_to_patches=True)
    assert torch.equal(real_tiles(output), torch.tensor(np.array(reference["pixel_values"])))
    whole = ours(images=images, text=text, do_image_splitting=False)
    assert whole["input_ids"] == [text_ids(ours, "a" + f"<img>{C4}</img>\nb" * len(images))]
    counts = ours._get_num_multimodal_tokens([(height, width) for width, height in sizes])
    assert counts.num_image_tokens == [len(text_ids(ours, image)) for image in golden]
    assert counts.num_image_patches == reference["num_patches"]
    assert ours.chat_template == TEMPLATE
    check_reloads(ours, tmp_path / "ours", call)


def test_internvl_puts_the_crops_in_reading_order_and_the_thumbnail_last(internvl_source):
    folder, config = internvl_source(image_mean=[0.0] * 3, image_std=[1.0] * 3, rescale_factor=1.0)
    levels = np.array([[10, 20], [30, 40], [50, 60]], np.uint8)
    picture = Image.fromarray(levels).resize((32, 48), Image.Resampling.NEAREST).convert("RGB")
    ours = VLMoEProcessor.from_dense(folder, config)
    tiles = ours(images=picture, text="<IMG_CONTEXT>", return_tensors="pt")["pixel_values"][0]
    assert tiles[:, 0, 8, 8].int().tolist()[:6] == [10, 20, 30, 40, 50, 60]
    assert tiles[-1, 0, 2, 2] < 15 < 55 < tiles[-1, 0, -2, -2]
    limits = [({"max_patches": 2}, 3), ({"max_patches": 1}, 1), ({"min_patches": 7}, 13)]
    for options, count in limits:
        other = ours(images=picture, text="<IMG_CONTEXT>", return_tensors="pt", **options)
        counts = ours._get_num_multimodal_tokens([(48, 32)], **options)
        assert other["pixel_values"].shape[1] == counts.num_image_patches[0] == count
        assert other["mm_token_type_ids"].sum() == 4 * count


def test_got_ocr2_tiles_can_be_marked_by_row_and_column(processor, make_image, seq):
    image_processor = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16})
    marked = VLMoEProcessor(image_processor, processor.tokenizer, image_seq_len=4)
    call = {"images": make_image(0, (16, 48)), "text": "<image>", "crop_to_patches": True}
    wanted = f"<row_1_col_1>{seq}\n<row_2_col_1>{seq}\n<row_3_col_1>{seq}\n\n<global-img>{seq}"
    assert marked(**call)["input_ids"] == [text_ids(marked, wanted)]
    pixels = np.zeros((3, 16, 48), np.float32)  # not rescaled: stays an array
    prepared = marked(images=pixels, text="<image>", do_image_splitting=True, do_rescale=False)
    tokens = marked.tokenizer.convert_ids_to_tokens(prepared["input_ids"][0])
    assert "<row_1_col_3>" in tokens and "<row_2_col_1>" not in tokens


def test_a_converted_processor_feeds_the_model(
    internvl_source, smolvlm_source, tiny_model, make_image
):
    for make, token in ((internvl_source, "<IMG_CONTEXT>"), (smolvlm_source, "<image>")):
        folder, config = make()
        ours, model = VLMoEProcessor.from_dense(folder, config), tiny_model(config)
        images = [[make_image(0, (40, 20)), make_image(1)], [], [make_image(2, (16, 50))]]
        texts = [f"a{token}{token}", "b", f"{token}c"]
        batch = ours(images=images, text=texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("splitting", [True, False])
def test_truncation_never_cuts_an_image_of_a_converted_processor(
    family, side, splitting, internvl_source, smolvlm_source, make_image
):
    folder, config = internvl_source() if family == "internvl" else smolvlm_source()
    ours = VLMoEProcessor.from_dense(folder, config)
    ours.tokenizer.truncation_side = side
    image = make_image(0, (32, 16))
    rest = len(text_ids(ours, "x y z"))
    text = f"x y z{ours.image_token}" if side == "left" else f"{ours.image_token}x y z"
    call = {"images": image, "text": text, "do_image_splitting": splitting}
    ids = ours(**call)["input_ids"][0]
    kept = ours(**call, truncation=True, max_length=len(ids) - rest)["input_ids"][0]
    assert kept == (ids[rest:] if side == "left" else ids[:-rest])
    with pytest.raises(ValueError, match="would cut an image"):
        ours(**call, truncation=True, max_length=len(ids) - rest - 1)


def test_without_resizing_idefics3_tiles_are_the_sources_too(
    with_tokens, idefics3_config, make_image, tmp_path
):
    image_processor = Idefics3ImageProcessorPil(
        do_resize=False, size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    theirs = Idefics3Processor(image_processor, with_tokens(), 4)
    ours = VLMoEProcessor.from_dense(theirs, idefics3_config)
    call = {"images": make_image(0, (70, 20)), "text": "<image>", "return_tensors": "pt"}
    assert torch.equal(ours(**call)["pixel_values"], theirs(**call)["pixel_values"])
    check_reloads(ours, tmp_path, call)


def test_the_source_stays_as_it_was(internvl_source, idefics3_config):
    folder, config = internvl_source()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16})
    before, size = image_processor.to_dict(), len(tokenizer)
    ours = VLMoEProcessor.from_dense((image_processor, tokenizer), config)
    assert (ours.tokenizer.padding_side, ours.image_processor.crop_to_patches) == ("left", True)
    assert (tokenizer.padding_side, image_processor.to_dict()) == ("right", before)
    tiling = Idefics3ImageProcessorPil(max_image_size={"longest_edge": 16})
    assert len(VLMoEProcessor.from_dense((tiling, tokenizer), idefics3_config).tokenizer) > size
    assert len(tokenizer) == size


def test_special_tokens_and_lengths_are_kept(hub_folder, with_tokens, llava_config):
    tokenizer = with_tokens()
    fields = {"model_max_length": 77, "padding_side": "right", "truncation_side": "left"}
    files = {"preprocessor_config.json": LLAVA_IMAGES["siglip"].to_dict()}
    files["config.json"] = {"model_type": "llava"}  # old: nothing else names the family
    source = hub_folder(tokenizer, fields, **files)
    ours = VLMoEProcessor.from_dense(source, llava_config("siglip")).tokenizer
    assert (ours.model_max_length, ours.padding_side, ours.truncation_side) == (77, "right", "left")
    assert ours.special_tokens_map == tokenizer.special_tokens_map
    assert ours.get_vocab() == tokenizer.get_vocab()
    assert ours.decode(ours("<image>a<|end|>")["input_ids"], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("kind", ["settings", "tokenizer"])
def test_the_sources_own_image_token_is_kept(kind, hub_folder, with_tokens, tiny_config):
    tokenizer = with_tokens(["<picture>"])
    settings = {"processor_class": "LlavaProcessor", "image_token": "<picture>"}
    fields: dict[str, Any] = {}
    if kind == "tokenizer":  # which comes first
        fields = {"extra_special_tokens": {"image_token": "<picture>"}}
        settings["image_token"] = "<image>"
    image_fields = LLAVA_IMAGES["siglip"].to_dict()
    files = {"preprocessor_config.json": image_fields, "processor_config.json": settings}
    source = hub_folder(tokenizer, fields, **files)
    config = tiny_config(
        text={"vocab_size": 400},
        image_token_id=tokenizer.convert_tokens_to_ids("<picture>"),
        pixel_shuffle_factor=1,
    )
    assert VLMoEProcessor.from_dense(source, config).image_token == "<picture>"
    config.image_token_id = 5
    with pytest.raises(ValueError, match=r"`image_token_id` is 5 .* '<picture>' is token 316 "):
        VLMoEProcessor.from_dense(source, config)


def test_what_cannot_be_converted_exactly_is_refused_by_name(
    tokenizer, hub_folder, smolvlm_source, llava_config
):
    config = llava_config("siglip")
    next_processor = LlavaNextProcessor(LlavaNextImageProcessorPil(), tokenizer, patch_size=4)
    with pytest.raises(ValueError, match=r"a LlavaNextProcessor cannot .* \(it packs the tiles"):
        VLMoEProcessor.from_dense(next_processor, config)
    with pytest.raises(ValueError, match=r"a Qwen2VLProcessor cannot .*M-RoPE"):
        VLMoEProcessor.from_dense((Qwen2VLImageProcessorPil(), tokenizer), config)
    for name, reason in (
        ("PaliGemmaProcessor", "in both directions"),
        ("Qwen3VLProcessor", "M-RoPE"),
        ("FantasyProcessor", "; allowed: Idefics3Processor, InternVLProcessor, Llava"),
    ):
        folder = hub_folder(tokenizer, **{"processor_config.json": {"processor_class": name}})
        with pytest.raises(ValueError, match=f"a {name} cannot be converted exactly.*{reason}"):
            VLMoEProcessor.from_dense(folder, config)
    folder, config = smolvlm_source(image_processor_type="FantasyImageProcessor")
    with pytest.raises(ValueError, match="the image processor cannot be read"):
        VLMoEProcessor.from_dense(folder, config)


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("preprocessor_config.json", None, "the image processor"),
        ("preprocessor_config.json", "{", "the image processor"),
        ("processor_config.json", '{"image_seq_len": 4', "the processor's settings"),
        ("chat_template.json", "{}", "the processor's settings and chat template"),
        ("tokenizer.json", None, "the tokenizer"),
        ("tokenizer.json", "{", "the tokenizer"),
        ("tokenizer_config.json", "}", "the tokenizer"),
    ],
)
def test_missing_and_broken_files_are_named(file, content, what, smolvlm_source):
    folder, config = smolvlm_source()
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{folder}: {what}.* cannot be read \(\w+: ") as error:
        VLMoEProcessor.from_dense(folder, config)
    assert error.value.__cause__ is not None


def test_arguments_of_loading_reach_every_reader(smolvlm_source, tmp_path):
    folder, config = smolvlm_source()
    inner = tmp_path / "dense"
    inner.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(inner / path.name)
    ours = VLMoEProcessor.from_dense(tmp_path, config, subfolder="dense")
    assert ours.to_dict() == VLMoEProcessor.from_dense(inner, config).to_dict()


def tokens_of_a_repository(name: str, config: Any, revision: str) -> list[int]:
    """In a process whose Hub is the test's: the tokens that one image becomes."""
    processor = VLMoEProcessor.from_dense(name, config, revision=revision)
    return processor(images=Image.new("RGB", (20, 24)), text="<image>a")["input_ids"][0]


def push(source: Path, name: str) -> None:
    """Upload a folder."""
    from huggingface_hub import HfApi

    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=source)


def test_a_repository_of_the_hub_is_read_like_a_folder(hub, hub_process, smolvlm_source):
    folder, config = smolvlm_source(size={"longest_edge": 16})
    hub_process(push, folder, "tester/dense")
    ids = hub_process(tokens_of_a_repository, "tester/dense", config, "main")
    ours = VLMoEProcessor.from_dense(folder, config)
    assert ids == text_ids(ours, f"{WHOLE}a")
    with pytest.raises(ValueError, match="tester/dense: the processor's settings"):
        hub_process(tokens_of_a_repository, "tester/dense", config, "other")


def test_a_folder_that_does_not_exist_is_named(tmp_path, llava_config):
    with pytest.raises(ValueError, match=r"nowhere: the processor's settings .* cannot be read"):
        VLMoEProcessor.from_dense(tmp_path / "nowhere", llava_config("siglip"))


def test_a_source_that_does_not_fit_the_tower_is_refused(tokenizer, llava_config, smolvlm_source):
    folder, config = smolvlm_source(max_image_size={"longest_edge": 20})
    with pytest.raises(ValueError, match=r"makes 20x20 pixels .* the vision tower takes 16x16"):
        VLMoEProcessor.from_dense(folder, config)
    varied = CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"makes 16x32 pixels of an image of 16x32"):
        VLMoEProcessor.from_dense((varied, tokenizer), llava_config("siglip"))
    folder, config = smolvlm_source()
    config.pixel_shuffle_factor = 1
    with pytest.raises(ValueError, match=r"SmolVLMProcessor states 4 .* give 16 features"):
        VLMoEProcessor.from_dense(folder, config)
    llava = LlavaProcessor(LLAVA_IMAGES["clip"], tokenizer, 4, "default")
    with pytest.raises(ValueError, match=r"LlavaProcessor states 15 .* give 16 features"):
        VLMoEProcessor.from_dense(llava, llava_config("clip"))


def test_an_internvl_tokenizer_must_name_its_image_tokens(internvl_source):
    folder, config = internvl_source()
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["extra_special_tokens"]["end_image_token"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"InternVL model has no end_image_token; add"):
        VLMoEProcessor.from_dense(folder, config)


def test_an_unknown_tile_layout_is_refused(processor):
    with pytest.raises(ValueError, match=r"`tile_layout` is 'rows'; allowed: vlmoe, idefics3, int"):
        VLMoEProcessor(processor.image_processor, processor.tokenizer, tile_layout="rows")


def test_an_image_token_is_added_once_and_only_where_it_is_missing(
    tokenizer, tiny_config, make_image
):
    text_only = copy.deepcopy(tokenizer)
    before = len(text_only)
    assert add_image_token(text_only) == tokenizer.convert_tokens_to_ids("<image>")
    assert len(text_only) == before
    assert add_image_token(text_only, "<picture>") == before
    assert add_image_token(text_only, "<picture>") == before
    assert len(text_only) == before + 1
    config = tiny_config(text={"vocab_size": len(text_only)}, image_token_id=before)
    ours = VLMoEProcessor.for_config(config, text_only, image_token="<picture>")
    output = ours(images=make_image(), text="a<picture>b")
    assert output["input_ids"][0].count(before) == ours.image_seq_len
    decoded = text_only.decode(output["input_ids"][0], skip_special_tokens=True)
    assert decoded == "a b"
