"""What kvmsec knows: the cluster, its instances and their security, as frozen types."""
