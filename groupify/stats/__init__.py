"""What one pass of the dense model shows of its layers: positions, moments, scores, Fisher information."""
