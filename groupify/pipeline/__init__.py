"""The stages of a run: prepare, convert, train, export and check, time, report."""
