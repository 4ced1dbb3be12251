"""The command line: parse, call the API, print. One module for each command."""

from groupify.cli.main import cli, main

__all__ = ["cli", "main"]
