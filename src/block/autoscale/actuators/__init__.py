"""What starts and stops instances: one file each, by name in ``table``."""
