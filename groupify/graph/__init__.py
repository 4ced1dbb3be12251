"""The convs of a model, what feeds and reads each, and the permutation classes of its channels."""
