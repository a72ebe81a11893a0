"""The same answers from plain torch operations, on any device."""
