# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What the routers do: recorded, balanced, checked and drawn."""
