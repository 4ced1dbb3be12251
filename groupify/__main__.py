"""``python -m groupify``, also under torchrun."""

from groupify.cli.main import main

if __name__ == "__main__":
    main()
