"""The first call of each kind, compared on a sample with exact arithmetic on the host."""
