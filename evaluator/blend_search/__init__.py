"""The best blend of an ensemble's signals: ``python -m evaluator.blend_search``.

A stem is a weighted sum of signals, so its error's energy is quadratic in the weights: for each song the
inner products of the signals' errors tell the SDR of any blend. They are collected once, and then weights,
networks and costs are weighed up without a network running again.
"""
