"""`cluster verify`: what the nodes say, held against the cluster's state and each other."""
