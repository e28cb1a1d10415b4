# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""LoRA on experts: PEFT adapters that are computed by the routed path."""
