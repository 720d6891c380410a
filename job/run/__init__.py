"""An attempt at a run, from its claim to its end, and what reads or evaluates a run.

What people look at is made by ``publish`` and ``report``; what computes is in ``engine``.
"""
