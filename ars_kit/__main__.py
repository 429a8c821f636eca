"""``python -m ars_kit`` is ``arskit``."""

from ars_kit.cli import main

main()
