"""How well a running QEMU process is confined, whoever started it.

`examination` is the whole of it: `discovery` finds the processes, `reading` takes one bounded
snapshot of each, `packets` asks about the host's rules, `points` judges and `score` sums up. The
last two are pure.
"""
