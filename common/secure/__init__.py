"""Secure aggregation's parts, without Flower: keys, masks, shares and fixed-point sums.

Who uses them, in which order and against whom is told in ``docs/secure-aggregation.md``.
"""
