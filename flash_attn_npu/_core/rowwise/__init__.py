"""The same way for rotations, norms, gates and losses: all that is computed row by row."""
