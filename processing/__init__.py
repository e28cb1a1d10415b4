"""The image-text processor."""
