"""Results as dataclasses and, apart from them, their formatters."""
