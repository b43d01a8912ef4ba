"""Certificates, key files, and the judgement of a peer by its certificate."""
