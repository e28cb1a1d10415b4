# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Training: the trainer, its callbacks, checkpoints and evaluation."""
