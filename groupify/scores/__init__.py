"""A model on data: accuracy, divergence from the dense model, cost."""
