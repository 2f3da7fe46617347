"""Run a command while two network namespaces are joined by a wire with a given delay.

python examples/latency/wire.py [--delay SECONDS] COMMAND...

The namespaces are hfmpi0 (10.77.0.1) and hfmpi1 (10.77.0.2). A packet that enters one of them leaves the
other after the delay: a message and its reply take twice as long. Needs root and /dev/net/tun; both
namespaces are removed at the end. The wire uses a part of a core while packets are in transit.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
MTU = 60_000
SPIN = 200e-6  # seconds of busy waiting before a packet is due


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def end(number: int) -> int:
    """Create a namespace with one end of the wire in it; return the file from which its packets are read."""
    space, device = f"hfmpi{number}", f"wire{number}"
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
    ip("netns", "add", space)
    ip("link", "set", device, "netns", space)  # the file remains connected to the device
    ip("-n", space, "link", "set", "lo", "up")
    ip("-n", space, "addr", "add", f"10.77.0.{number + 1}/24", "dev", device)
    ip("-n", space, "link", "set", device, "mtu", str(MTU), "txqueuelen", "10000", "up")
    return file


def carry(files: tuple[int, int], delay: float, done: threading.Event) -> None:
    """Carry packets between the two ends until `done`."""
    flying: deque[tuple[float, int, bytes]] = deque()  # time when due, destination, content
    while not done.is_set():
        wait = flying[0][0] - time.perf_counter() if flying else 0.1
        ready = select.select(files, [], [], max(wait - SPIN, 0.0))[0]
        for file in ready:
            other = files[file == files[0]]
            flying.append((time.perf_counter() + delay, other, os.read(file, MTU + 100)))
        while flying and flying[0][0] <= time.perf_counter():
            _, other, packet = flying.popleft()
            os.write(other, packet)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.0, help="delay of a packet in seconds [0]")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND...")
    given = parser.parse_args()
    if os.geteuid() or not os.path.exists("/dev/net/tun"):
        sys.exit("wire.py needs root and /dev/net/tun")
    if any(os.path.exists(f"/run/netns/hfmpi{number}") for number in (0, 1)):
        sys.exit(
            "another wire exists: wait for its end, or remove it with `ip netns del hfmpi0; ip netns del "
            "hfmpi1`"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that `finally` runs
    done, wire = threading.Event(), None
    try:
        files = end(0), end(1)
        wire = threading.Thread(target=carry, args=(files, given.delay, done), daemon=True)
        wire.start()
        return subprocess.run(given.command).returncode
    finally:
        done.set()
        if wire:
            wire.join()
        for number in (0, 1):
            subprocess.run(["ip", "netns", "del", f"hfmpi{number}"], check=False)


if __name__ == "__main__":
    sys.exit(main())
