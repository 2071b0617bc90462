"""Sources of an engine's state that need nothing installed beside it; coarser than the plugin's shared memory."""
