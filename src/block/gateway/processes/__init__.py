"""Several worker processes as one gateway, and the self-test of each."""
