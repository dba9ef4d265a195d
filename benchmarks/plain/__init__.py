"""The same mathematics as `sphere`, written plainly: no reuse, no batching, no thinner factor.

They are slow and short enough to be checked by eye. The tests use them as oracles, the benchmarks as the other side of
each ratio. Nothing in `sphere` imports them.
"""
