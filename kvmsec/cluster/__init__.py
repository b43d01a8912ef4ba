"""Decisions over a cluster's nodes; it sees them through Protocols only."""
