"""Models: loaded by name, watched and edited at a hook point, and run no further than needed."""
