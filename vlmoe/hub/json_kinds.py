# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The kinds of values that the JSON files of a saved model hold, by names of files and fields.

Libraries read many of these fields late or never, and a wrong one fails far from the file, or not
at all. Fields outside the table are not judged here; the config checks the numbers in config.json.
"""

from pathlib import Path
from typing import Any

from .input_errors import InputError
from .json_files import read_json

_TEXT, _TEXTS, _OBJECT, _COUNT, _FLAG = (str,), (list,), (dict,), (int,), (bool,)
_TOKEN = (str, dict)  # a token's text, or its text and properties

ANY = (dict, list, str, bool, int, float, type(None))
OBJECTS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "adapter_config.json",
    "trainer_state.json",
    "train_results.json",
    "metrics.json",
    "evaluate_results.json",
)
LISTS = ("training_stages.json", "router_telemetry.json")
MAY_HOLD_NAN = ("trainer_state.json", "router_telemetry.json")  # Python writes logged values so

# file: field: kinds of its value; null stands for "not given" everywhere
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "config.json": {
        **dict.fromkeys(("text_config", "vision_config", "auto_map"), _OBJECT),
        **dict.fromkeys(("model_type", "transformers_version"), _TEXT),
        "architectures": _TEXTS,
    },
    "processor_config.json": {
        **dict.fromkeys(("image_processor", "auto_map"), _OBJECT),
        **dict.fromkeys(("processor_class", "image_token", "image_start_token"), _TEXT),
        **dict.fromkeys(("image_end_token", "global_image_token", "tile_layout"), _TEXT),
        **dict.fromkeys(("image_seq_len", "max_image_pixels", "max_image_side"), _COUNT),
    },
    "tokenizer_config.json": {
        **dict.fromkeys(("tokenizer_class", "processor_class", "padding_side", "backend"), _TEXT),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _TOKEN),
        **dict.fromkeys(("model_input_names",), _TEXTS),
        **dict.fromkeys(("clean_up_tokenization_spaces",), _FLAG),
        "model_max_length": (int, float),
        "auto_map": _OBJECT,
    },
}


def json_problem(file: Path) -> str | None:
    """Describe the problem of a JSON file, or return None.

    It does not parse, or holds other kinds of values than files of its name do.
    """
    name = file.name
    kinds = (dict,) if name in OBJECTS else (list,) if name in LISTS else ANY
    try:
        content = read_json(file, kinds, finite=name not in MAY_HOLD_NAN)
    except InputError as error:
        return str(error).removeprefix(f"{file}: ").rstrip(".")
    for field, allowed in FIELDS.get(name, {}).items():
        problem = _problem(content.get(field), allowed)
        if problem:
            return f"`{field}` {problem}"
    return None


def _problem(value: Any, allowed: tuple[type, ...]) -> str | None:
    if value is None:
        return None
    if type(value) not in allowed:
        return f"is {value!r:.60}; allowed: {', '.join(kind.__name__ for kind in allowed)}"
    if allowed is _TEXTS and not all(isinstance(each, str) for each in value):
        return f"is {value!r:.60}; allowed: a list of texts"
    return None
