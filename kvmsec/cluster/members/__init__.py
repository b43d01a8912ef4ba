"""Who belongs to the cluster, and as what: each a sequence that may be killed and run again."""
