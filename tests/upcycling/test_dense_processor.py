"""The processor of a dense model becomes VLMoE's: same tokens, same pixels."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dense_sources import GOT_OCR2, IDEFICS3_TOKENS, TEMPLATE, text_ids
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaImageProcessorPil,
    LlavaProcessor,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.smolvlm.processing_smolvlm import _prompt_single_image

from vlmoe.processing.processing_vlmoe import DEFAULT_CHAT_TEMPLATE, VLMoEProcessor

SIZES = [(24, 20), (16, 16), (40, 20), (9, 33), (60, 16), (3, 2)]  # width, height
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


def real_tiles(output: Any) -> torch.Tensor:
    """(real tiles of the batch, 3, H, W)."""
    return output["pixel_values"][output["pixel_attention_mask"].flatten(2).any(-1)]


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
    counts = ours._get_num_multimodal_tokens([(48, 16)], do_image_splitting=False)
    assert (counts.num_image_tokens, counts.num_image_patches) == ([6], [1])
    counts = ours._get_num_multimodal_tokens([(height, width) for width, height in sizes])
    assert counts.num_image_tokens == [len(text_ids(ours, image)) for image in golden]
    assert counts.num_image_patches == reference["num_patches"]
    assert ours.chat_template == TEMPLATE
    check_reloads(ours, tmp_path / "ours", call)


def test_frames_of_videos_have_the_sources_words(internvl_source, smolvlm_source, make_image):
    """Of SmolVLM each frame's; the introduction is another part of its prompt."""
    frames = [make_image(seed, (40, 20)) for seed in range(3)]
    video = {"type": "video", "video": frames, "fps": 0.02}
    chat, template = [{"role": "user", "content": [video]}], "{%- for message in messages -%}"
    template += "{%- for part in message.content -%}{%- if part.type == 'text' -%}{{- part.text -}}"
    template += "{%- else -%}{{- 'X' -}}{%- endif -%}{%- endfor -%}{%- endfor -%}"
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}

    ours = VLMoEProcessor.from_dense(*internvl_source())
    fields = {"start_image_token": "<img>", "end_image_token": "</img>", "image_seq_length": 4}
    theirs = SimpleNamespace(image_token="<IMG_CONTEXT>", **fields)
    pixels = {"pixel_values_videos": [torch.zeros(3, 3, 16, 16)]}
    wanted = InternVLProcessor.replace_video_token(theirs, pixels, 0)
    own = template.replace("'X'", "'<IMG_CONTEXT>\n'")  # as the family's template writes images
    output = ours.apply_chat_template(chat, chat_template=own, **options)
    assert output["input_ids"].tolist() == [text_ids(ours, f"{wanted}\n")]
    assert output["pixel_values"].shape[:2] == (1, 3)

    ours = VLMoEProcessor.from_dense(*smolvlm_source())
    text = ours.apply_chat_template(chat, chat_template=template.replace("'X'", "'<image>'"))
    times = ["00:00", "00:50", "01:40"]
    assert text == "".join(f"\nFrame from {time}:<image>" for time in times)
    output = ours.apply_chat_template(
        chat, chat_template=template.replace("'X'", "'<image>'"), **options
    )
    single = _prompt_single_image(4, FAKE, "<image>", "<global-img>")
    wanted = "".join(f"\nFrame from {time}:{single}" for time in times)
    assert output["input_ids"].tolist() == [text_ids(ours, wanted)]


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
