# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Figures of data, training and answers, as PNG files."""
