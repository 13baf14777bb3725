"""The best blend of an ensemble's signals: ``python -m evaluator.blend_search``.

A stem is a weighted sum of signals, so the energy of its error is quadratic in the weights. The inner
products of the signals therefore determine the SDR of any blend of a song. They are collected once. After
that, weights, networks and costs can be compared without running a network again.
"""
