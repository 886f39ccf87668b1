"""The backends, each a way of running a call. Each gives the right result for every call that it accepts.

They do not import each other. They share `kernels` (PyTorch's), `recurrence` (plain ops), `double_backward`, `gather`.
"""
