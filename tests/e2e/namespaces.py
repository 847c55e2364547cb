"""Two hosts: two network namespaces joined by a line. Their names are of this process, so that tests may run side by side."""

import contextlib
import os
import shutil
import subprocess

import pytest

from conftest import wait_until

NAMES = (f"tandem-{os.getpid()}-a", f"tandem-{os.getpid()}-b")
DEVICES = ("tandem-va", "tandem-vb")  # each inside its namespace
ADDRESSES = ("10.93.47.1", "10.93.47.2")


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


def inside(name, *command):
    """A command line that runs in a namespace."""
    return ["ip", "netns", "exec", name, *map(str, command)]


def join_by_veth():
    ip("link", "add", DEVICES[0], "netns", NAMES[0], "type", "veth", "peer", "name", DEVICES[1], "netns", NAMES[1])


@contextlib.contextmanager
def two_namespaces(join=join_by_veth, mtu=None):
    """`join` makes the two devices. Skips the test where this cannot be had."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    made = ip("netns", "add", NAMES[0], check=False)
    if made.returncode != 0:
        pytest.skip(f"this machine gives no network namespaces: {made.stderr.strip()}")
    try:
        ip("netns", "add", NAMES[1])
        join()
        for name, address, device in zip(NAMES, ADDRESSES, DEVICES):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            if mtu:
                ip("-n", name, "link", "set", device, "mtu", str(mtu))
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        for name, device in zip(NAMES, DEVICES):  # the kernel takes up to a second to call them running
            wait_until(lambda: "LOWER_UP" in ip("-n", name, "link", "show", device).stdout, 5, f"{device} runs")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name, check=False)
