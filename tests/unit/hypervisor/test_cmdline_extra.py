"""Which arguments a node's configuration may add, and that no other gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import ForbiddenArguments
from hypervisor.extra_arguments import ALLOWED, check_extra_arguments


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("-boot", "order=dc,menu=on"),
        ("-rtc", "base=2030-01-01T00:00:00,clock=vm"),
        ("-rtc", "base=localtime,driftfix=slew"),
        ("-uuid", "5b2b9c6e-0a43-4a6e-8b0a-0b5a3f6a1c11"),
        ("-smbios", "type=1,manufacturer=Example Ltd.,product=Box 3"),
        ("-overcommit", "cpu-pm=on"),
        ("-action", "panic=pause"),
        ("-global", "kvm-pit.lost_tick_policy=discard"),
        ("-device", "virtio-balloon-pci"),
        ("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
        ("-no-reboot", "-device", "virtio-rng-pci,max-bytes=1024,period=1000"),
    ],
)
def test_a_harmless_argument_is_taken_as_it_is(arguments: tuple[str, ...]) -> None:
    assert check_extra_arguments(arguments) == arguments


def test_two_dashes_are_as_good_as_one() -> None:
    assert check_extra_arguments(["--boot", "menu=on"]) == ("-boot", "menu=on")


@pytest.mark.parametrize(
    "arguments",
    [
        # files
        ("-drive", "file=/etc/shadow"),
        ("-blockdev", '{"driver":"file"}'),
        ("-D", "/etc/passwd"),
        ("-pidfile", "/run/x"),
        ("-readconfig", "/etc/x"),
        ("-fw_cfg", "name=a,file=/etc/shadow"),
        ("-boot", "splash=/etc/shadow"),
        ("-smbios", "file=/etc/shadow"),
        ("-smbios", "type=11,path=/etc/shadow"),
        ("-global", "virtio-net-pci.romfile=/etc/shadow"),
        ("-device", "virtio-rng-pci,romfile=/etc/shadow"),
        ("-object", "memory-backend-file,id=a,mem-path=/x"),
        ("-trace", "file=/x"),
        ("-plugin", "/tmp/x.so"),
        ("-virtfs", "local,path=/"),
        # sockets
        ("-monitor", "tcp::4444,server=on"),
        ("-qmp", "unix:/x"),
        ("-chardev", "socket,id=a,path=/x"),
        ("-netdev", "user,id=a"),
        ("-nic", "user"),
        ("-vnc", ":1"),
        ("-gdb", "tcp::1234"),
        ("-s",),
        ("-incoming", "exec:sh"),
        # the confinement
        ("-sandbox", "off"),
        ("-runas", "root"),
        ("-daemonize",),
        ("-run-with", "user=root"),
        ("-chroot", "/"),
        ("-machine", "dump-guest-core=on"),
        ("-accel", "tcg"),
        ("-cpu", "max"),
        ("-add-fd", "fd=3,set=3"),
        ("-set", "device.nic0.mac=x"),
        ("-device", "vfio-pci,host=0"),
        ("-device", "vhost-user-blk-pci,chardev=x"),
        ("-device", '{"driver":"virtio-balloon-pci"}'),
        ("-device", "driver=vfio-pci"),
        # what looks like something else
        ("image.raw",),
        ("",),
        ("-",),
        ("--",),
        ("-boot",),
        ("-boot", "menu=on,"),
        ("-boot", "menu=on,,splash=/x"),
        ("-boot", "menu"),
        ("-boot", ""),
        ("-uuid", "x"),
        ("-smbios", "type=1,product=a,,file=/x"),
        ("-BOOT", "menu=on"),
        ("---boot", "menu=on"),
        ("-boot=menu=on",),
        ("-rtc", "base=2030-01-01\n"),
    ],
)
def test_any_other_argument_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ForbiddenArguments) as caught:
        check_extra_arguments(arguments)
    assert caught.value.problems


def test_every_refused_argument_is_named() -> None:
    with pytest.raises(ForbiddenArguments) as caught:
        check_extra_arguments(["-vnc", ":1", "-boot", "menu=on", "-s", "-boot", "splash=x"])
    assert [problem.where for problem in caught.value.problems] == [
        "'-vnc'",
        "'-s'",
        "-boot 'splash=x'",
    ]
    assert "-boot" in str(caught.value)


@given(
    st.lists(st.sampled_from(["-boot", "-device", "-uuid", "menu=on", "-no-reboot"]) | st.text())
)
def test_what_gets_through_are_allowed_options_and_their_values(arguments: list[str]) -> None:
    try:
        checked = list(check_extra_arguments(arguments))
    except ForbiddenArguments:
        return
    while checked:
        option = checked.pop(0)
        assert option in ALLOWED
        if option != "-no-reboot":
            assert checked.pop(0)
