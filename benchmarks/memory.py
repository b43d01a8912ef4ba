"""What processes and files really use."""

from pathlib import Path


def memory_of(pid: int) -> dict[str, int]:
    """The sums of a process's mappings in KiB (proc_pid_smaps(5))."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            found[name] = int(rest.split()[0])
    return found


def bytes_below(directory: Path) -> int:
    """What is really used by the files below a directory, those on mounts in it too."""
    entries = [directory, *directory.rglob("*")]
    return sum(entry.lstat().st_blocks * 512 for entry in entries)
