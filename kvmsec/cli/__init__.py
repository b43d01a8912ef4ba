"""The command line: a thin layer over the node's agent and the cluster's operations.

Nothing slow is imported at the top of a module here: a command imports what it needs when it runs,
so that `kvmsec --help` answers at once.
"""
