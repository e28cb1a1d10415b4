"""The model: vision tower, connector and sparse decoder."""
