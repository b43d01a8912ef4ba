"""Which uid an instance may have: the pool, its users, who holds which uid, and what a uid left.

`ranges` is the pool as text and as a set, `accounts` says whether its uids are fit for it,
`provision` makes their users, `claims` draws and releases them, and `usage` finds and ends what a
uid still has.
"""
