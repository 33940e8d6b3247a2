"""The tests.

The libraries make millions of objects that live as long as the process. With Python's thresholds the garbage collector
looks through them all again and again: a third of the time of importing, and a fifth of whatever compiles.
"""

import gc

gc.set_threshold(100_000, 50, 100)
