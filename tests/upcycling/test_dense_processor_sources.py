"""What the processor of a dense model is read from, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from dense_sources import text_ids
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)

from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.upcycling.dense_processor import add_image_token

SIGLIP = SiglipImageProcessorPil(size={"height": 16, "width": 16})
CLIP = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


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


@pytest.mark.parametrize("named_by", ["tokenizer", "model"])  # where nothing else names the class
def test_special_tokens_and_lengths_are_kept(named_by, hub_folder, with_tokens, llava_config):
    tokenizer = with_tokens()
    fields = {"model_max_length": 77, "padding_side": "right", "truncation_side": "left"}
    files = {"preprocessor_config.json": SIGLIP.to_dict()}
    if named_by == "model":
        files["config.json"] = {"model_type": "llava"}
    else:
        fields["processor_class"] = "LlavaProcessor"
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
    image_fields = SIGLIP.to_dict()
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
    fake, tile = "<fake_token_around_image>", "<image><image><image><image>"
    hub_process(push, folder, "tester/dense")
    ids = hub_process(tokens_of_a_repository, "tester/dense", config, "main")
    ours = VLMoEProcessor.from_dense(folder, config)
    assert ids == text_ids(ours, f"{fake}<global-img>{tile}{fake}a")
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
    llava = LlavaProcessor(CLIP, tokenizer, 4, "default")
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
