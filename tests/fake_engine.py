"""The fake twin: the engine on sockets and a poll that misbehave as planned, on any system.

A Plan says which call fails and how. `faulty(module, plan)` gives the engine's module a substitute for `socket` (its
sockets send short, and raise at the k-th call) and a poll that reports late and in another order.
"""
from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import threading

CALLS = ("recv_into", "send", "accept", "getsockopt", "shutdown")


class Plan:
    """Which call fails: the *at*-th *call* (from 1; 0: none) with *error*, *times* in a row.

    *short*: every send takes one to that many bytes (0: as many as the kernel does). *late*: the part of ready events
    that are kept back and come later. *seed*: everything random is the same for the same seed.
    """

    def __init__(self, call="", at=0, error=errno.ECONNRESET, times=1, short=0, late=0.0, seed=1):
        self.call, self.at, self.error, self.times, self.short, self.late = call, at, error, times, short, late
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.counts = dict.fromkeys(CALLS + ("sendmsg", "register"), 0)
        self.fired = 0

    def strike(self, call):
        """Count *call*; raise if it is the one. sendmsg counts as send."""
        call = "send" if call == "sendmsg" else call
        with self.lock:
            self.counts[call] += 1
            hit = call == self.call and 0 < self.at <= self.counts[call] < self.at + self.times
            self.fired += hit
        if hit:
            raise OSError(self.error, os.strerror(self.error))      # OSError itself makes the right subclass

    def portion(self, size):
        """How many of *size* bytes a send takes."""
        if not self.short or size < 2:
            return size
        with self.lock:
            return self.random.randint(1, min(size, self.short))

    def choose(self, events):
        """Which of *events* are reported now, and in which order."""
        if not self.late:
            return events
        with self.lock:
            now = [event for event in events if self.random.random() >= self.late]
            self.random.shuffle(now)
        return now


def _socket_class(plan):
    class FaultySocket(socket.socket):
        """A socket whose calls go by the plan."""

        def recv_into(self, *args):
            plan.strike("recv_into")
            return super().recv_into(*args)

        def send(self, data, *args):
            plan.strike("send")
            return super().send(memoryview(data)[:plan.portion(len(data))], *args)

        def sendmsg(self, chunks, *args):
            plan.strike("sendmsg")
            chunks = list(chunks)
            if not plan.short:
                return super().sendmsg(chunks, *args)
            data = b"".join(chunks)
            return super().send(data[:plan.portion(len(data))])

        def accept(self):
            plan.strike("accept")
            fd, address = self._accept()
            return type(self)(self.family, self.type, self.proto, fileno=fd), address

        def getsockopt(self, *args):
            plan.strike("getsockopt")
            return super().getsockopt(*args)

        def shutdown(self, how):
            plan.strike("shutdown")
            return super().shutdown(how)

    return FaultySocket


class FaultySocketModule:
    """Stands in for the module `socket`."""

    def __init__(self, plan):
        self.socket = _socket_class(plan)

    def __getattr__(self, name):
        return getattr(socket, name)


class LatePoll:
    """A poller that keeps some events back, and whose register can fail.

    What is kept back is kept here and comes with a later poll, since an edge is reported once; a change of what is
    watched makes the system look again.
    """

    def __init__(self, poller, plan):
        self._poller, self._plan = poller, plan
        self._kept = {}                     # {descriptor: mask}
        self.close = poller.close

    def register(self, *args):
        self._plan.strike("register")
        return self._poller.register(*args)

    def modify(self, fd, mask):
        self._kept.pop(fd, None)
        return self._poller.modify(fd, mask)

    def unregister(self, fd):
        self._kept.pop(fd, None)
        return self._poller.unregister(fd)

    def poll(self, timeout, *args):
        for fd, mask in self._poller.poll(0 if self._kept else timeout, *args):
            self._kept[fd] = self._kept.get(fd, 0) | mask
        now = self._plan.choose(list(self._kept.items()))
        for fd, _ in now:
            del self._kept[fd]
        return now


@contextlib.contextmanager
def faulty(module, plan):
    """Within this, engines made of *module* have the plan's faults."""
    before = module.socket, module._make_poller
    module.socket = FaultySocketModule(plan)
    module._make_poller = lambda: LatePoll(before[1](), plan)
    try:
        yield plan
    finally:
        module.socket, module._make_poller = before
