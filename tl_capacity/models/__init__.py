"""Models: loaded by name, watched and edited at a hook point, run and stopped early."""
