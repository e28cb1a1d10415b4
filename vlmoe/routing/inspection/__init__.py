# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The page that shows which experts tokens and image patches are sent to."""
