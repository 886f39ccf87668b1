"""The backends, each a way of running a call. Each gives the right result for every call that it accepts.

The four that `auto` chooses from (`packed`, `padded`, `bptt`, `scan`) do not import each other. They share the rest.
"""
