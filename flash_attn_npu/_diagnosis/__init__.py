"""What is installed, whether it fits together, and whether attention would be fused.

Facts are read from disk (`installed`, `clashes`, `settings`), in a child process that may die of
them (`probe`), or in this one (`loaded`); `page` puts them together. Nothing but the child imports
torch or torch_npu.
"""
