#!/usr/bin/env python3
"""Joins two network namespaces by a line with a delay, for kernels without `tc netem`: packets go from one TUN device to
the other through this process, DELAY_MS later. Ends when its standard input closes.

    delayed_link.py NAMESPACE_A DEVICE_A NAMESPACE_B DEVICE_B DELAY_MS
"""

import collections
import ctypes
import fcntl
import os
import select
import struct
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
PACKET_BYTES = 65536
MAX_QUEUED = 4096  # packets on the line; more are lost, as on any line


def open_device(namespace, name):
    with open(f"/var/run/netns/{namespace}") as target:
        if ctypes.CDLL(None, use_errno=True).setns(target.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def main():
    ends = [open_device(sys.argv[1], sys.argv[2]), open_device(sys.argv[3], sys.argv[4])]
    delay_s = float(sys.argv[5]) / 1000
    print("ready", flush=True)
    line = collections.deque()  # (when, to, packet)
    while True:
        wait_s = max(0, line[0][0] - time.monotonic()) if line else None
        readable = select.select([*ends, sys.stdin], [], [], wait_s)[0]
        if sys.stdin in readable:
            return
        for source, to in ((ends[0], ends[1]), (ends[1], ends[0])):
            try:
                while source in readable and len(line) < MAX_QUEUED:
                    line.append((time.monotonic() + delay_s, to, os.read(source, PACKET_BYTES)))
            except OSError:  # nothing more, or the device is down
                pass
        while line and line[0][0] <= time.monotonic():
            _, to, packet = line.popleft()
            try:
                os.write(to, packet)
            except OSError:  # the device is down: the packet is lost
                pass


if __name__ == "__main__":
    main()
