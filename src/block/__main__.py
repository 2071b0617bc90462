"""``python -m block`` is ``block``."""

from block.cli import main

main()
