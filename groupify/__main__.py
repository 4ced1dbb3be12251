"""``python -m groupify``, also under torchrun."""

from groupify.cli import main

main()
