"""Built-in plugins that attach to models. They reach the core through the same entry points as any other plugin."""
