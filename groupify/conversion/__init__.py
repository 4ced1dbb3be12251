"""Grouped convs in the place of dense ones, with weights fitted to data."""
