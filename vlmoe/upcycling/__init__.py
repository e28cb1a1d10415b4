# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Upcycling: a dense vision-language model becomes a sparse one that computes the same function.

After "Sparse Upcycling" (https://arxiv.org/abs/2212.05055). Read in this order:

- dense_configs.py: which dense models fit, and what they are called in our configuration;
- options.py: what is asked for, and the sparse configuration that follows;
- weight_plan.py: where each tensor of the sparse model comes from;
- exactness.py: dense and sparse logits side by side, and the report;
- conversion.py: `from_dense`, `from_vision_text`.
"""
