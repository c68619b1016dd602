"""``python -m lightning_easier`` is ``lightning-easier``."""

from lightning_easier.command import main

main()
