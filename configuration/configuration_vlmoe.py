# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Configuration of VLMoE: a vision tower, a connector and a sparse mixture-of-experts decoder.

`VLMoEConfig` joins the decoder's `VLMoETextConfig` (configuration_vlmoe_text.py) with any vision
encoder that `AutoModel` knows and says how image features become tokens.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec

from .configuration_vlmoe_text import MODEL_TYPE, OwnModelTypes, VLMoETextConfig, require
from .hub_code import HubCodeMixin

PRESETS = Path(__file__).parent / "presets"


@strict
class VLMoEConfig(OwnModelTypes, HubCodeMixin, PreTrainedConfig):
    r"""Configuration of the whole model.

    Args:
        vision_config: config (or dict with `model_type`) of any vision encoder that `AutoModel`
            knows; SigLIP by default, without its pooling head, which would get no gradient.
        text_config: `VLMoETextConfig` or dict.
        image_token_id: the token that each image feature replaces.
        vision_feature_layer: which `hidden_states` of the tower become image features, one index or
            several (concatenated on the channels), as in LLaVA.
        vision_use_last_hidden_state: take `last_hidden_state` (after the tower's final norm;
            InternVL, SmolVLM) instead of `hidden_states[-1]` (before it; LLaVA). Needs
            `vision_feature_layer=-1`.
        vision_feature_select_strategy: `"default"` drops the first (class) token, `"full"` keeps
            all.
        pixel_shuffle_factor: joins r x r neighbouring features into one token of r * r times the
            channels.
        projector_layer_norm: LayerNorm before the connector's first linear (InternVL).
        projector_num_layers: one linear (SmolVLM) or two with `projector_hidden_act` between them
            (LLaVA).
        multimodal_projector_bias: biases in the connector's linears.

    Raises:
        ValueError: a field has a value that is not allowed; the message names field, value and what
            is allowed.

    Example:
        >>> from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
        >>> config = VLMoEConfig.from_preset("tiny")
        >>> model = VLMoEForConditionalGeneration(config)
    """

    model_type = MODEL_TYPE
    hub_classes = {  # noqa: RUF012 - declared in HubCodeMixin
        "AutoConfig": "configuration.configuration_vlmoe.VLMoEConfig",
        "AutoModel": "modeling_vlmoe.modeling_vlmoe.VLMoEModel",
        "AutoModelForImageTextToText": "modeling_vlmoe.modeling_vlmoe"
        ".VLMoEForConditionalGeneration",
    }
    keys_to_ignore_at_inference = [  # noqa: RUF012 - Trainer wants a list
        "past_key_values",
        "aux_loss",
        "z_loss",
        "entropy_loss",
        "router_logits",
        "image_hidden_states",
    ]
    sub_configs_defaults = {  # noqa: RUF012 - transformers' own declaration
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="siglip_vision_model",
            init_kwargs={"vision_use_head": False},
        ),
        "text_config": VLMoETextConfig,
    }

    vision_config: Any = None  # PreTrainedConfig; a dict or None becomes one
    text_config: Any = None  # VLMoETextConfig; a dict or None becomes one
    image_token_id: int = 4
    vision_feature_layer: int | list[int] = -1
    vision_use_last_hidden_state: bool = True
    vision_feature_select_strategy: str = "full"
    pixel_shuffle_factor: int = 1
    projector_layer_norm: bool = False
    projector_num_layers: int = 2
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the sub-configs, take over the text config's tying, then check the fields."""
        self._refuse_foreign(kwargs)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check every field that has a range; also run by transformers before saving."""
        text, last = self.text_config, self.vision_use_last_hidden_state
        if not isinstance(text, VLMoETextConfig):
            raise ValueError(
                f"`text_config` is a {type(text).__name__}; "
                "allowed: VLMoETextConfig or a dict of its fields."
            )
        vision = self.vision_config
        if not hasattr(vision, "num_hidden_layers"):
            raise ValueError(
                f"`vision_config` is a {type(vision).__name__}; allowed: the config of a vision "
                "encoder alone, such as a SiglipVisionConfig, or a dict of its fields."
            )
        layers = vision.num_hidden_layers
        chosen = self.vision_feature_layers
        in_range = bool(chosen) and all(-layers - 1 <= layer <= layers for layer in chosen)
        allowed = f"{-layers - 1} to {layers}, one or several"
        require(self, "vision_feature_layer", in_range, allowed)
        allowed = "-1 where `vision_use_last_hidden_state` is True"
        require(self, "vision_feature_layer", not last or chosen == [-1], allowed)
        strategy_ok = self.vision_feature_select_strategy in ("default", "full")
        require(self, "vision_feature_select_strategy", strategy_ok, "default, full")
        act_ok = self.projector_hidden_act in ACT2FN
        require(self, "projector_hidden_act", act_ok, ", ".join(ACT2FN))
        require(self, "pixel_shuffle_factor", self.pixel_shuffle_factor > 0, "1 or more")
        require(self, "projector_num_layers", self.projector_num_layers in (1, 2), "1, 2")
        in_vocabulary = 0 <= self.image_token_id < text.vocab_size
        allowed = f"0 to {text.vocab_size - 1} (text_config.vocab_size - 1)"
        require(self, "image_token_id", in_vocabulary, allowed)

    @property
    def vision_feature_layers(self) -> list[int]:
        """`vision_feature_layer` as a list."""
        layer = self.vision_feature_layer
        return [layer] if isinstance(layer, int) else list(layer)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VLMoEConfig":
        """The configuration of a named size; `overrides` replace top-level fields.

        Raises:
            ValueError: there is no preset of that name, or no presets in a copy from the Hub.
        """
        if not PRESETS.is_dir():
            raise ValueError(
                "This is a copy of VLMoE's code from a model folder, which has no presets; "
                "they come with the package: `from vlmoe import VLMoEConfig`."
            )
        names = sorted(path.stem for path in PRESETS.glob("*.json"))
        if name not in names:
            raise ValueError(f"There is no preset {name!r}; allowed: {', '.join(names)}.")
        return cls(**json.loads((PRESETS / f"{name}.json").read_text()) | overrides)


__all__ = ["VLMoEConfig"]
