"""The same hypothesis profile as for all properties: the same examples on every run."""

from hypothesis import settings

settings.register_profile("properties", deadline=None, derandomize=True, database=None)
settings.load_profile("properties")
