# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Nothing here is collected by an ordinary run of pytest; `make conformance` names the files."""

collect_ignore = ["stand_ins"]
