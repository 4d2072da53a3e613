"""Sparse autoencoders, transcoders and bases: loaded by name, asked for their active latents."""
