"""How other libraries' own attention paths are led to ours while installed."""
