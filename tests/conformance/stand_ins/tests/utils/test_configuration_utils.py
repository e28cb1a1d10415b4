# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Stands in for a file that no release of transformers holds."""

# Values other than the defaults of fields that every configuration has.
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "problem_type": "regression",
    "id2label": {0: "label"},
    "label2id": {"label": 0},
}
