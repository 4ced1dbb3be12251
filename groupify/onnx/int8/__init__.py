"""Statically quantised files."""
