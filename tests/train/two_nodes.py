"""Two nodes on one machine, each of which starts one process of a launch: joined by a wire, or over its loopback."""

import os
import shutil
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

from forked import LaunchOfScript
from launching import LAUNCH, QUIET, command, finish

ADDRESSES = ("10.77.0.1", "10.77.0.2")
WIRE = "wire"  # what each node calls its end
SENT = 8  # in /proc/net/dev the column of bytes that were sent


class Loopback:
    """Two nodes that are two launches beside each other, which takes no privileges."""

    address, device = "127.0.0.1", "lo"

    def __enter__(self):
        for port in range(10_000 + os.getpid() % 10_000, 30_000):  # below those that the system gives to connections
            with suppress(OSError), socket.socket() as free:
                free.bind((self.address, port))
                self.port = port
                return self
        raise OSError("no port is free")

    def __exit__(self, *_):
        pass

    def holder(self, node):
        """A process in the namespaces of a node: none has its own."""
        return None


class Wire:
    """Two network namespaces joined by a pair of veth devices; they are gone with the process that made them."""

    address, port, device = ADDRESSES[0], 29500, WIRE

    def __enter__(self):
        self._holders = []
        with ExitStack() as stack:
            self._hold(stack, ["unshare", "--map-root-user", "--net"])
            self._hold(stack, self.inside(0, "unshare", "--net"))
            self._ip(0, "link", "add", WIRE, "type", "veth", "peer", "name", WIRE, "netns", str(self._holders[1]))
            for node, address in enumerate(ADDRESSES):
                self._ip(node, "address", "add", f"{address}/24", "dev", WIRE)
                for device in ("lo", WIRE):
                    self._ip(node, "link", "set", device, "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def holder(self, node):
        """A process in the namespaces of a node."""
        return self._holders[node]

    def inside(self, node, *words):
        """The command as it is typed on a node."""
        return ["nsenter", "--preserve-credentials", "--user", "--net", "-t", str(self._holders[node]), *words]

    def cut(self):
        """Let nothing pass any more, and tell nobody."""
        self._ip(1, "link", "set", WIRE, "down")

    def _hold(self, stack, unshare):
        """Make a namespace, with a process in it that ends when its input does, which is when this one ends."""
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        holder = stack.enter_context(
            subprocess.Popen([*unshare, "sh", "-c", "echo made; exec cat"], text=True, **pipes)
        )
        if holder.stdout.readline() != "made\n":
            raise OSError(holder.stderr.read().strip())
        self._holders.append(holder.pid)

    def _ip(self, node, *words):
        done = subprocess.run(self.inside(node, "ip", *words), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def why_no_wire():
    """What keeps this machine from having two namespaces and a wire between them; empty where nothing does."""
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        return f"there is no {missing[0]} here"
    try:
        with Wire():
            return ""
    except OSError as error:
        return f"no network namespaces can be made here: {error}"


def start_on(nodes, node, launch, *script):
    """One node's launch of a script, of one process of the two."""
    where = ["--num_machines", "2", "--machine_rank", node, "--num_processes", "2"]
    first = ["--main_process_ip", nodes.address, "--main_process_port", nodes.port]
    alone = [] if launch.startswith("ddp") else ["--deepspeed_multinode_launcher", "standard"]
    environment = os.environ | QUIET | {"GLOO_SOCKET_IFNAME": nodes.device}
    return LaunchOfScript(command(LAUNCH / launch, *where, *first, *alone, *script), environment, nodes.holder(node))


def start_on_both(nodes, launch, *script):
    """The launches of both nodes."""
    return [start_on(nodes, node, launch, *script) for node in (0, 1)]


def finish_both(launches, timeout_s=600):
    """What each has written to stdout and stderr; none is left behind."""
    try:
        return [finish(each, timeout_s) for each in launches]
    finally:
        for each in launches:
            if each.poll() is None:
                each.terminate()
                each.communicate(timeout=120)


def run_on_both(nodes, launch, *script):
    """What each node has written to stdout when both are done; one that fails fails this."""
    launches = start_on_both(nodes, launch, *script)
    written = finish_both(launches)
    assert [each.returncode for each in launches] == [0, 0], "\n".join(errors[-3000:] for _, errors in written)
    return [output for output, _ in written]


def sent():
    """Bytes that have left the node of this process through its wire, headers and all."""
    lines = (line.split(":") for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line)
    return int({name.strip(): numbers for name, numbers in lines}[WIRE].split()[SENT])
