"""Recovery: whatever uses data after the conversion."""
