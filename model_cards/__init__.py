# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The template of the model card; cards of released models are in folders beside it."""
