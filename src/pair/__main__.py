"""``python -m pair``."""

from pair.cli import main

main()
