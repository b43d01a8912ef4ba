"""What the firewall does not load until it must."""

import subprocess
import sys


def test_no_slow_library_is_loaded_before_rules_change():
    code = (
        "import sys, firewall.guard, firewall.iptables.chains, firewall.nftables.tables;"
        "print(*{'iptc', 'asyncio', 'distutils', 'pkg_resources'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
