"""``python -m groupify``, also under torchrun."""

from groupify.cli.main import main

main()
