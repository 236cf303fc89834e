"""The clients of test_cross.py that are more than a socket: checked streams, and connections left at a certain moment.

    python tests/cross_load.py '{"source-1": ["127.0.0.1", 1234], ...}'

leaves connections to these ports at every moment of their lives (MOMENTS), prints "ready", and waits to be killed.
"""
import json
import os
import random
import selectors
import signal
import socket
import struct
import sys
import time
import zlib

DEADLINE = 30.0             # seconds without any reply until a load gives up
RESET = struct.pack("ii", 1, 0)         # SO_LINGER: close() sends a reset
SIZES = (0, 1, 40, 64, 100, 500, 1500, 4080, 4096, 9000, 20000, 70000)      # bytes of a packet behind its mark
BLOB = random.Random(7).getrandbits(8 << 20).to_bytes(1 << 20, "big")


def frame(packet):
    return struct.pack(">I", len(packet)) + packet


# --- checked streams -------------------------------------------------------------------------------------------------

class Stream:
    """One connection of a Load: what it sends is made from its number and the packet's, so that any reply can be checked."""

    def __init__(self, address, index, ways, sizes, small):
        self.index, self.ways, self.sizes = index, ways, sizes
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if small:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)     # before connecting, to have an effect
        self.socket.settimeout(DEADLINE)
        self.socket.connect(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.out = bytearray()
        self.inbox = bytearray()
        self.sent = self.received = 0               # packets
        self.due = list(range(ways))                # of each way: the number of the next reply

    def packet(self, number):
        """Connection, number, CRC of the rest, the rest."""
        size = self.sizes[(self.index * 31 + number * 7) % len(self.sizes)]
        start = (self.index * 7919 + number * 104729) % (len(BLOB) - size)
        body = BLOB[start:start + size]
        return struct.pack(">III", self.index, number, zlib.crc32(body)) + body

    def queue(self, count):
        for _ in range(count):
            self.out += frame(self.packet(self.sent))
            self.sent += 1

    def flush(self):
        while self.out:
            try:
                del self.out[:self.socket.send(self.out)]
            except BlockingIOError:
                return

    def receive(self):
        """Check what has come; returns how many replies that were. AssertionError for one that is not due."""
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return 0
        if not data:
            raise AssertionError("connection %d ended after %d of %d replies" % (self.index, self.received, self.sent))
        inbox = self.inbox
        inbox += data
        start = count = 0
        while len(inbox) - start >= 4:
            size, = struct.unpack_from(">I", inbox, start)
            if len(inbox) - start - 4 < size:
                break
            self.check(bytes(inbox[start + 4:start + 4 + size]))
            start += 4 + size
            count += 1
        del inbox[:start]
        self.received += count
        return count

    def check(self, packet):
        number = struct.unpack_from(">I", packet, 4)[0] if len(packet) >= 12 else -1
        way = number % self.ways
        if number != self.due[way]:
            raise AssertionError("connection %d: reply %d came where %d was due" % (self.index, number, self.due[way]))
        if packet != self.packet(number):
            raise AssertionError("connection %d: reply %d is not what was sent" % (self.index, number))
        self.due[way] += self.ways


class Load:
    """Many Streams, each with *window* packets under way. Replies are in order within each of *ways*: number % ways.

    Each *small*-th connection has a small receive buffer, so that the server meets backpressure.
    """

    def __init__(self, address, conns, window, ways=1, sizes=SIZES, small=0):
        self.window = window
        self.selector = selectors.DefaultSelector()
        self.streams = []
        try:
            for index in range(conns):
                stream = Stream(tuple(address), index, ways, sizes, small and index % small == 0)
                self.streams.append(stream)
                self.selector.register(stream.socket, selectors.EVENT_READ, stream)
        except BaseException:
            self.close()
            raise

    def run(self, seconds):
        """Keep all windows full for that long, wait for every reply, and see every connection end after the last one.

        Returns how many replies came. AssertionError for any that is wrong, lost, doubled, or out of order.
        """
        end = time.monotonic() + seconds
        for stream in self.streams:
            stream.queue(self.window)
            self.push(stream)
        heard = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= end and not any(stream.received < stream.sent for stream in self.streams):
                break
            ready = self.selector.select(0.1)
            if ready:
                heard = now
            assert now - heard < DEADLINE, "silence; replies are missing on %s" % [
                (stream.index, stream.received, stream.sent) for stream in self.streams
                if stream.received < stream.sent][:5]
            for key, events in ready:
                count = key.data.receive() if events & selectors.EVENT_READ else 0
                if count and now < end:
                    key.data.queue(count)
                self.push(key.data)
        for stream in self.streams:
            self.finish(stream)
        return sum(stream.received for stream in self.streams)

    def push(self, stream):
        stream.flush()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if stream.out else 0)
        if self.selector.get_key(stream.socket).events != events:
            self.selector.modify(stream.socket, events, stream)

    def finish(self, stream):
        """Nothing may come after the last reply but the end."""
        assert not stream.inbox, "connection %d: bytes behind the last reply" % stream.index
        stream.socket.setblocking(True)
        stream.socket.settimeout(DEADLINE)
        stream.socket.shutdown(socket.SHUT_WR)
        rest = stream.socket.recv(1 << 16)
        assert not rest, "connection %d: %d bytes behind the last reply" % (stream.index, len(rest))

    def close(self):
        for stream in self.streams:
            stream.socket.close()
        self.selector.close()


# --- moments ---------------------------------------------------------------------------------------------------------

def order(count, size, close=0):
    """What a "source" port of cross_server.py is asked for."""
    return frame(struct.pack(">IIB", count, size, close))


def connected(address, **options):
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(DEADLINE)
    if options.get("small"):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(tuple(address))
    return client


def _connecting(address):
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.setblocking(False)
    client.connect_ex(tuple(address))
    return client


def _silent(address):
    return connected(address)


def _in_header(address):
    client = connected(address)
    client.sendall(b"\0\0")
    return client


def _after_header(address):
    client = connected(address)
    client.sendall(struct.pack(">I", 1000))
    return client


def _in_packet(address):
    client = connected(address)
    client.sendall(order(1, 10) + struct.pack(">I", 1000) + b"x" * 500)
    return client


def _in_large_packet(address):
    client = connected(address)
    client.sendall(struct.pack(">I", 1 << 20) + b"x" * 300000)
    return client


def _in_reply(address):
    """The server is sending one large packet, of which the beginning was read."""
    client = connected(address, small=True)
    client.sendall(order(1, 8 << 20))
    left = 100000
    while left:
        left -= len(client.recv(left))
    return client


def _congested(address):
    """The server has stopped receiving, because this one does not read; more was sent to it after that."""
    client = connected(address, small=True)
    client.sendall(order(400, 1 << 16))
    client.sendall(order(1, 10) * 100 + b"\0\0")
    return client


def _closing(address):
    """The server wants to close, and has much to send before it can."""
    client = connected(address, small=True)
    client.sendall(order(100, 1 << 16, 1))
    return client


def _lingering(address):
    """The server has closed its side; this one has read all, and does not close."""
    client = connected(address)
    client.sendall(order(1, 1000, 1))
    while client.recv(1 << 16):
        pass
    return client


MOMENTS = {"connecting": _connecting, "silent": _silent, "in the header": _in_header, "after the header": _after_header,
           "in a packet": _in_packet, "in a large packet": _in_large_packet, "in a reply": _in_reply,
           "congested": _congested, "closing": _closing, "lingering": _lingering}


def main():
    kept = [at(address) for address in json.loads(sys.argv[1]).values() for _ in range(3)
            for name, at in MOMENTS.items() if name != "connecting"]
    kept += [_connecting(address) for address in json.loads(sys.argv[1]).values() for _ in range(20)]
    os.write(1, b"ready\n")
    while kept:
        signal.pause()


if __name__ == "__main__":
    main()
