"""The kernels: each turns a validated problem into a function of tensors."""
