"""How well a running QEMU process is confined, whoever started it.

`discovery` finds the processes, `reading` takes one bounded snapshot of each, `points` judges it
point by point and `score` sums that up; only the first two look at the system.
"""
