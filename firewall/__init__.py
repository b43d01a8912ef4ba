"""What the uid of an instance may send on the node's network: nothing, proved by a packet."""
