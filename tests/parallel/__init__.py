"""Tests of what several processes do together, and the helper `world` that runs them."""
