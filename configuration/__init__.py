"""Configuration classes and model size presets."""
