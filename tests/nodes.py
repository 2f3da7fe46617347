"""Simulated nodes of a cluster: namespaces with separate host names and networks (Linux, root).

examples/faults/surroundings.py uses it too.
"""

import contextlib
import os
import shutil
import subprocess
import time
from unittest import SkipTest


class Nodes:
    """The nodes `nodea`, `nodeb`, ... and the network between them.

    Attributes
    ----------
    names : list of str
    mpirun : list of str
        The words that start a program on all of them, on as many ranks as there are.
    """

    def __init__(self, folder, ranks, stack):
        """Create a node for each entry of `ranks`, its number of ranks; mpirun runs on the first."""
        self.names = [f"node{letter}" for letter in "abcdefgh"[: len(ranks)]]
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(self.names, 1)}
        known, launch, hosts = folder / "known_hosts", folder / "launch", folder / "hosts"
        known.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{where} {name}\n" for name, where in addresses.items())
        )
        self.holders = {}
        for name in ("switch", *self.names):
            line = (
                f"mount --bind '{known}' /etc/hosts && hostname {name} && ip link set lo up && exec sleep 600"
            )
            holder = subprocess.Popen(["unshare", "-u", "-n", "-m", "sh", "-c", line])
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            self.holders[name] = holder.pid
            deadline = time.monotonic() + 10
            while self.run(name, "hostname", check=False, capture_output=True).stdout != f"{name}\n".encode():
                assert time.monotonic() < deadline
                time.sleep(0.02)
        self.run("switch", "ip link add bridge type bridge && ip link set bridge up")
        for name, address in addresses.items():
            self.run("switch", f"ip link add {name} type veth peer name eth0 netns {self.holders[name]}")
            self.run("switch", f"ip link set {name} master bridge && ip link set {name} up")
            self.run(name, f"ip addr add {address}/24 dev eth0 && ip link set eth0 up")
        cases = "".join(f"{name}) holder={holder};;\n" for name, holder in self.holders.items())
        launch.write_text(
            '#!/bin/bash\nwhile [ "${1#-}" != "$1" ]; do shift; done\n'
            f'case $1 in\n{cases}esac\nshift\nexec nsenter -t $holder -u -n -m sh -c "$*"\n'
        )
        launch.chmod(0o755)
        hosts.write_text("".join(f"{name}:{count}\n" for name, count in zip(self.names, ranks, strict=True)))
        self.mpirun = [*self.on("nodea"), "env", "UCX_TLS=tcp,self"]  # no memory is shared between nodes
        self.mpirun += ["mpirun", "-launcher", "ssh", "-launcher-exec", str(launch), "-f", str(hosts)]
        self.mpirun += ["-n", str(sum(ranks))]

    def on(self, name):
        """Return the command prefix that runs a command on a node."""
        return ["nsenter", "-t", str(self.holders[name]), "-u", "-n", "-m"]

    def run(self, name, line, check=True, **options):
        """Run a shell command on a node."""
        return subprocess.run([*self.on(name), "sh", "-c", line], check=check, **options)

    def cut_off(self, name):
        """Drop all packets from and to a node from now on."""
        self.run("switch", f"ip link set {name} nomaster")


def obstacle():
    """Return the reason why nodes cannot be created, or None."""
    if os.geteuid() or not all(map(shutil.which, ("mpirun", "unshare", "nsenter", "ip"))):
        return "needs root, mpirun, unshare, nsenter and ip"
    tried = subprocess.run(["unshare", "-u", "-n", "-m", "true"], check=False, capture_output=True)
    return "may not make namespaces" if tried.returncode else None


@contextlib.contextmanager
def nodes(folder, *ranks):
    """Create nodes with these numbers of ranks inside the context; skip the test if this fails."""
    if reason := obstacle():
        raise SkipTest(reason)
    with contextlib.ExitStack() as stack:
        yield Nodes(folder, ranks, stack)
