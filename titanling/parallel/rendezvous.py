"""How the ranks of a run meet: one store that all have reached, or one line that names the address and who is missing.

torch's own start-up waits quietly for a peer that never comes, then writes pages of warnings and stack frames; so the
waiting is done here, and torch's store is asked only what it can answer at once. Where all ranks are on one host, the
store and gloo listen at its loopback address alone: whoever reaches them could take part.
"""

import errno
import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from titanling.errors import UserError
from titanling.ranks import this_process

SIOCGIFADDR = 0x8915  # netdevice(7)
NAMED_AT_MOST = 16
POLL_SECONDS = 0.1
BACKLOG = 1024
BEAT_SECONDS, SPEAKS_AFTER_SECONDS = 1.0, 3.0
AT_WORK, FAILED = "at work", "failed"
FAREWELL_SECONDS = 5.0
"""How long rank 0 keeps the store of a failed start open, for the others to read why."""


@dataclass(frozen=True)
class Place:
    """Where and how long one rank looks for the others."""

    host: str
    port: int
    rank: int
    size: int
    timeout: timedelta

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def limit(self) -> str:
        """The timeout and the key that sets it."""
        return f"{self.timeout.total_seconds():.0f} s (comm.init_timeout_seconds)"

    def deadline(self) -> float:
        """The end of the timeout if it starts now, by the monotonic clock."""
        return time.monotonic() + self.timeout.total_seconds()


def rendezvous(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A store that all ranks have reached, at the environment's MASTER_ADDR and MASTER_PORT.

    Raises UserError naming the address, and who is missing, after at most 3 × `timeout` and mostly after one. On hosts
    whose own name leads to 127.0.0.0/8, sets GLOO_SOCKET_IFNAME unless it is set.
    """
    me = this_process()
    place = Place(me.address, me.port, rank, size, timeout)
    store = _early.pop().stop() if _early else _open_store(place)
    try:
        missing, outside = _meet(place, store)
    except RuntimeError as error:
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: rank 0 at {place} has gone ({_first_line(error)}); look at its messages"
        ) from None
    if missing:
        note = "" if _address_towards(place.host) else " (no name or address that this node can reach)"
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: {_describe(missing)} of {size} did not come to {place}{note} within"
            f" {place.limit}; are all nodes started, with the same NNODES and NGPU, each its NODE_RANK and a way there?"
        )
    _choose_gloo_interface(outside)
    return store


class _AtWork(threading.Thread):
    """Shows in the store, again and again, that rank 0 is there, though it has not joined the others yet."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__(name="at work", daemon=True)
        self._store, self._beats, self._ended = store, store.clone(), threading.Event()
        self.work = "data"
        """What it works on, as the others see it."""
        self.start()

    def run(self) -> None:
        """Beat until the end."""
        beat = 0
        with suppress(RuntimeError):  # the store is gone: the run is ending
            while not self._ended.wait(BEAT_SECONDS if beat else 0):
                beat += 1
                self._beats.set(AT_WORK, f"{self.work} {beat}")

    def stop(self) -> dist.Store:
        """End it; the store."""
        self._ended.set()
        self.join()
        return self._store


_early: list[_AtWork] = []
"""What `at_work` has begun, for `rendezvous` to end."""


@contextmanager
def at_work(timeout: timedelta) -> Iterator[None]:
    """On rank 0 of several: open the store, and show there that this rank works on what comes before it joins.

    The others' clock starts when it joins, or is not seen at work any more. A UserError is told to the other nodes too.
    Raises UserError as `rendezvous`.
    """
    me = this_process()
    store = _open_store(Place(me.address, me.port, me.rank, me.size, timeout))
    showing = _AtWork(store)
    try:
        yield
    except UserError as error:
        showing.stop()
        store.set(FAILED, str(error))
        if me.per_node != me.size:  # on one node, the launcher ends the others
            told = [f"told {other}" for other in range(1, me.size)]
            _missing(store, told, time.monotonic() + FAREWELL_SECONDS)
        raise
    showing.work = "joining"
    _early.append(showing)


def _open_store(place: Place) -> dist.Store:
    """Rank 0 opens the store (unless torchrun's agent has), the others wait until they reach it."""
    host, port, timeout = place.host, place.port, place.timeout
    hosts_store = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if hosts_store:
            here, listening = _loopback_socket(place)
            store = dist.TCPStore(
                here, port, place.size, True, timeout, wait_for_workers=False, master_listen_fd=listening
            )
        else:
            _wait_for_listener(host, port, place.deadline())
            store = dist.TCPStore(host, port, place.size, False, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        reason = _first_line(error)
        if "EADDRINUSE" in reason or getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(f"MASTER_PORT={port}: in use on node 0 ({host}); set another one on all nodes") from None
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: rank {place.rank} could not {'open' if hosts_store else 'reach'} {place} within"
            f" {place.limit}: {reason}; is node 0 running, and is that its address as the other nodes see it?"
        ) from None
    return dist.PrefixStore(f"titanling/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _loopback_socket(place: Place) -> tuple[str, int | None]:
    """Where rank 0 opens the store: at the loopback address alone if all ranks are on this node and meet there.

    Else torch listens on every address, and rank 0's own way there is the shortest: MASTER_ADDR may be a forwarded one.
    """
    address = "127.0.0.1"
    if this_process().per_node != place.size:
        return address, None
    try:
        address = socket.gethostbyname(place.host)
    except OSError:
        return address, None
    if not _is_loopback(address):
        return "127.0.0.1", None
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, place.port))
        server.listen(BACKLOG)
        return address, server.detach()


def _wait_for_listener(host: str, port: int, deadline: float) -> None:
    """Return once something listens there; OSError (why not) after `deadline`, a time of the monotonic clock."""
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(POLL_SECONDS, left)).close()
            return
        except OSError:
            if time.monotonic() + POLL_SECONDS >= deadline:
                raise
        time.sleep(POLL_SECONDS)


def _meet(place: Place, store: dist.Store) -> tuple[list[int], str]:
    """Wait for all ranks; return those that did not come, and an address of some node that is not a loopback one.

    Rank 0 decides, and tells the others. Raises RuntimeError if rank 0 goes, UserError if this rank is there already.
    """
    if store.add(f"claims of {place.rank}", 1) > 1:
        raise UserError(
            f"NODE_RANK: rank {place.rank} is at {place} already; give every node its own NODE_RANK, or another"
            " MASTER_PORT if a second run uses this one"
        )
    names = [f"rank {other}" for other in range(place.size)]
    store.set(names[place.rank], _address_towards(place.host) or "")
    if place.rank == 0:
        missing = _missing(store, names, place.deadline())
        addresses = [] if missing else [address.decode() for address in store.multi_get(names)]
        outside = next((address for address in addresses if address and not _is_loopback(address)), "")
        if addresses and all(map(_is_loopback, addresses)):
            outside = addresses[0]  # all on this host
        store.set("outcome", json.dumps([missing, outside]))
    else:
        _await_outcome(place, store)
    missing, outside = json.loads(store.get("outcome"))
    if missing:
        store.set(f"told {place.rank}", "")
        if place.rank == 0:
            told = [f"told {other}" for other in range(place.size) if other not in missing]
            _missing(store, told, time.monotonic() + FAREWELL_SECONDS)
    return missing, outside


def _await_outcome(place: Place, store: dist.Store) -> None:
    """Wait for rank 0's word: while it is at work, and then twice the timeout, for it may have started last and waits
    its own full time. Raises UserError if it has failed or is silent, RuntimeError if it has gone."""
    asking = _Asking(store.clone())
    patience, started, said = 2 * place.timeout.total_seconds(), time.monotonic(), not _speaks(place.rank)
    deadline = started + patience
    while not asking.word:
        now = time.monotonic()
        if asking.error is not None:
            raise asking.error
        if asking.at_work:
            asking.at_work, deadline = False, now + patience  # until the next answer
            if not said and asking.work == "data" and now - started > SPEAKS_AFTER_SECONDS:
                said = True
                print(f"rank {place.rank} waits for rank 0, which prepares or checks the data", flush=True)
        if now > deadline:
            raise UserError(
                f"MASTER_ADDR, MASTER_PORT: rank 0 at {place} has been silent for twice {place.limit}; look at its"
                " messages and node"
            )
        time.sleep(POLL_SECONDS)
    if asking.word == FAILED:
        problem = store.get(FAILED).decode()
        store.set(f"told {place.rank}", "")
        raise UserError(problem)


class _Asking(threading.Thread):
    """Asks the store what rank 0 does; in a thread, for a store whose process is suspended answers nobody."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__(name="asking", daemon=True)
        self._store = store
        self.word = ""
        """"outcome" or FAILED once it is there."""
        self.at_work, self.work = False, ""
        self.error: RuntimeError | None = None
        self.start()

    def run(self) -> None:
        """Ask until there is a word."""
        seen = b""
        try:
            while not self.word:
                self.word = next((word for word in (FAILED, "outcome") if self._store.check([word])), "")
                beat = self._store.get(AT_WORK) if self._store.check([AT_WORK]) else b""
                if beat != seen:
                    seen, self.work, self.at_work = beat, beat.decode().partition(" ")[0], True
                time.sleep(POLL_SECONDS)
        except RuntimeError as error:
            self.error = error


def _speaks(rank: int) -> bool:
    """Whether this rank says what its whole node waits for."""
    local_rank = this_process().local_rank
    return local_rank == 0 or rank == 1


def _missing(store: dist.Store, names: list[str], deadline: float) -> list[int]:
    """Indices of the `names` that the store does not hold by `deadline`, a time of the monotonic clock."""
    while not store.check(names):
        if time.monotonic() > deadline:
            return [index for index, name in enumerate(names) if not store.check([name])]
        time.sleep(POLL_SECONDS)
    return []


def _describe(ranks: list[int]) -> str:
    """E.g. "rank 8, 9 (NODE_RANK 1)"; nodes as far as the launcher says how many ranks each has."""

    def some(numbers: list[int]) -> str:
        return ", ".join(map(str, numbers[:NAMED_AT_MOST])) + (" …" if len(numbers) > NAMED_AT_MOST else "")

    per_node = this_process().per_node
    nodes = f" (NODE_RANK {some(sorted({rank // per_node for rank in ranks}))})" if per_node else ""
    return f"rank {some(ranks)}{nodes}"


def unreachable(error: Exception, rank: int) -> UserError:
    """What to tell the user when the ranks have met at the store, and their connections to one another then failed."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    own = f'interface "{interface}"' if interface else f'the address of its name "{socket.gethostname()}"'
    there = ", ".join(f"{name} {address}" for name, address in _interfaces())
    return UserError(
        f"GLOO_SOCKET_IFNAME: rank {rank}, with {own}, and the other ranks met at"
        f" {this_process().address}:{this_process().port} but cannot connect to one another"
        f" ({_first_line(error)}); on each node set GLOO_SOCKET_IFNAME to the interface that leads to the others"
        f" (here: {there}), and let the firewall between the nodes pass all TCP ports"
    )


def _choose_gloo_interface(outside: str) -> None:
    """Have gloo use the network that leads to `outside`, an address of some node, loopback if all are on one host.

    "": not known. gloo listens at the address of the host's own name. Debian, and many containers, list that name as
    127.0.1.1, where no other node can reach it; and on one host, nobody else should.
    """
    if not outside or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        own = socket.gethostbyname(socket.gethostname())
        with socket.socket() as probe:
            probe.bind((own, 0))
    except OSError:
        own = "127.0.0.1"  # what gloo takes where the name leads nowhere
    known = _is_loopback(own) or _is_loopback(outside)
    interface = _interface_of(_address_towards(outside)) if known else None
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def _address_towards(host: str) -> str | None:
    """This host's IPv4 address on the way to `host`; None if there is no way. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def _interface_of(address: str | None) -> str | None:
    """Name of the network interface that has this IPv4 address."""
    return next((name for name, own in _interfaces() if own == address), None)


def _interfaces() -> Iterator[tuple[str, str]]:
    """Names and IPv4 addresses of this host's network interfaces."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has no IPv4 address
            yield name, socket.inet_ntoa(answer[20:24])


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
