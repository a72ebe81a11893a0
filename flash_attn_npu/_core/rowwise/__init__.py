"""The same way for rotations and gates: all that is computed row by row."""
