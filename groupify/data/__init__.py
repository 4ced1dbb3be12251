"""Data sets from a spec, and the batches that are read from them."""
