"""Which layer gets how many groups, and why."""
