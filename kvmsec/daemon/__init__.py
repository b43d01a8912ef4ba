"""A node's daemon: the front that parses the network, and the root part that acts."""
