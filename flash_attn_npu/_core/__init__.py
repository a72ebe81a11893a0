"""What stands behind the mirrored names: one column, in which imports point down only.

attention, rowwise (flows) -> table -> kernels -> problems -> ground, as `tests/house` holds it.
"""
