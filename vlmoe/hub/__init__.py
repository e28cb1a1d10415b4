# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Files that are read and written: checks, locks, provenance, the model card."""
