"""A plugin package for tl-capacity: one of each thing that a plugin may add."""
