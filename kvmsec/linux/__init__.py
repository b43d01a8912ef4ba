"""What kvmsec asks of the kernel: the standard library and a little ctypes, nothing else.

The one part of kvmsec that `uidpool`, `firewall` and `hypervisor` may import.
"""
