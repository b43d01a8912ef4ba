"""`cluster renew-crypto`: new certificates for a running cluster, and no node cut off meanwhile.

Both the old and the new are trusted everywhere before anybody shows the new, and everybody shows
the new before anybody stops to trust the old. What was begun stands in a journal on the master
(`journal`), what comes next is told from it alone (`plan`), and each step is one that may be done
twice (`sequence`): so that a master killed at any of them goes on, or back.
"""
