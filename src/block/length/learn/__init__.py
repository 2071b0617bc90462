"""The learned model: its parts, its training, its file."""
