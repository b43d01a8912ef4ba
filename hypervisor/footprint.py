"""What a QEMU needs of the node at most, worked out from its machine: memory, threads, files.

These are bounds for a QEMU that behaves: too low, and a guest is killed for nothing; too high, and
one that was taken over has the difference. Each figure is a measured one or QEMU's or the kernel's
own maximum, with room where guests differ.
"""

from collections.abc import Sequence
from typing import Final, Literal

from hypervisor.machine import Machine

_MIB: Final = 1 << 20
_BASE_MIB: Final = 64
_GUEST_PART: Final = 40
_VCPU_MIB: Final = 1
_QUEUE_KIB: Final = 32
_DISK_MIB: Final = 16
_NIC_MIB: Final = 4
_QCOW2_MIB: Final = 48
_TCG_MIB: Final = 1024

_POOL_THREADS: Final = 64
_VHOST_THREADS: Final = 2
_OTHER_THREADS: Final = 32

_OTHER_DESCRIPTORS: Final = 256
_LEAST_DESCRIPTORS: Final = 1024


def memory_mib(machine: Machine, accelerator: Literal["kvm", "tcg"], *, files_bytes: int) -> int:
    """The most memory that a machine's QEMU takes, the guest's own included.

    `files_bytes`: what of its in-memory filesystems is charged to it at most, which are the boot
    files (see `Newborn.become`) and its output. The page cache of images that aren't opened with
    O_DIRECT is charged as well and has what is left, since the kernel takes it back before it
    kills.

    Measured with QEMU 7.2 on Linux 6.18 (memory.max_usage_in_bytes less the guest's memory, all of
    that touched; the same to 1 MiB in repeated runs), and what is set aside for it:

    - a machine of 128 MiB with 1 vcpu and nothing else: 19 MiB; 64, as libraries of QEMU's that
      nobody else has mapped yet are charged to it (20 MiB of program alone);
    - each GiB of the guest: 4.5 MiB, which are page tables (2) and KVM's maps of the guest (2.5);
      a 40th (25.6 MiB), since KVM may take a 50th for shadow pages where the guest runs guests or
      the processor has no second level of paging (KVM_PERMILLE_MMU_PAGES, arch/x86/kvm);
    - each vcpu: 0.2 MiB; 1, since what its thread allocates has an arena of its own (mallopt(3));
    - each disk: 0.9 MiB, and 15 KiB for each of its queues, of which it has one a vcpu; 16 MiB
      for requests that must be copied to be aligned (O_DIRECT) and 32 KiB;
    - each NIC: 0.8 MiB; 4;
    - each qcow2 image: 32 MiB of L2 cache at most, and 4 clusters of reference counts of at most
      2 MiB (docs/qcow2-cache.txt, there since QEMU 3.1); 48 with the tables above them;
    - emulation: a buffer for translated code of 1 GiB at most (accel/tcg/region.c).
    """
    queues = len(machine.disks) * machine.vcpus
    formats = [image.format for disk in machine.disks for image in disk.backing]
    formats += [disk.format for disk in machine.disks]
    overhead = (
        _BASE_MIB
        + -(-machine.memory_mib // _GUEST_PART)
        + _VCPU_MIB * machine.vcpus
        + _DISK_MIB * len(machine.disks)
        + -(-queues * _QUEUE_KIB // 1024)
        + _NIC_MIB * len(machine.nics)
        + _QCOW2_MIB * formats.count("qcow2")
        + (_TCG_MIB if accelerator == "tcg" else 0)
        + -(-files_bytes // _MIB)
    )
    return machine.memory_mib + overhead


def locked_mib(machine: Machine) -> int:
    """What is added where QEMU locks its memory (`-overcommit mem-lock=on`, mlockall(2)).

    The stack of every thread is whole in memory then, 8 MiB where nobody says otherwise
    (pthread_attr_setstacksize(3)), and so are libraries of which little is used.
    """
    return 8 * tasks(machine) + 256


def tasks(machine: Machine) -> int:
    """The most threads that a machine's QEMU has at once.

    One a vcpu; 64 that do blocking I/O for all disks together, since no disk has an I/O thread
    and so a pool of its own (THREAD_POOL_MAX_THREADS_DEFAULT, QEMU's include/block/thread-pool.h);
    a vhost worker and KVM's own for each NIC with vhost, which are threads of
    QEMU since Linux 6.4. 3 others were seen (main, RCU, and one of KVM's or of QEMU's I/O); there
    is room for 32.
    """
    return (
        machine.vcpus
        + _POOL_THREADS
        + _VHOST_THREADS * sum(nic.vhost for nic in machine.nics)
        + _OTHER_THREADS
    )


def descriptors(machine: Machine) -> int:
    """The most file descriptors that a machine's QEMU has open at once.

    Seen: 11, one a vcpu, one an image. A driver that runs in the guest adds two eventfds (kick and
    interrupt) for each queue: one a vcpu and disk (a SCSI controller has its own), two or three a
    NIC. 256 are for what is handed over later.
    """
    images = sum(1 + len(disk.backing) for disk in machine.disks)
    controllers = len(machine.disks) + 1
    wanted = (
        _OTHER_DESCRIPTORS
        + 2 * machine.vcpus
        + 4 * images
        + controllers * (2 * machine.vcpus + 8)
        + 16 * len(machine.nics)
    )
    return max(_LEAST_DESCRIPTORS, wanted)


def largest_file_bytes(written: Sequence[int], *, files: Sequence[int]) -> int:
    """How large a file that its process writes may become.

    `written`: of each image that it writes to, how large that may become. `files`: the boot files
    that the jail copies, and the room for its output.
    """
    return max((*written, *files), default=0)
