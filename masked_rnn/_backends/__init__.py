"""The ways of running a call. Each meets the whole contract alone; none imports another.

What they share: `kernels` (PyTorch's), `recurrence` (plain ops), `double_backward`, `gather`.
"""
