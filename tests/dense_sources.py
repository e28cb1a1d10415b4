"""What the processors of dense models have on the Hub: tokens, settings, image processors."""

from vlmoe.processing.processing_vlmoe import VLMoEProcessor

TEMPLATE = "{% for message in messages %}USER: {{ message.content }} ASSISTANT:{% endfor %}"
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


def text_ids(processor: VLMoEProcessor, text: str) -> list[int]:
    """The tokens of a text, written out."""
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]
