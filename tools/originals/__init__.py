"""What other projects' own code computes from given weights, and how far what is computed here is from it.

A record is a pair of files, ``NAME.json`` and ``NAME.npz``: names and shapes of weights and features, from which
their values follow (:mod:`tools.originals.values`), objects, and the numbers that the original computed.
"""
