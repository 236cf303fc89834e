"""The servers that are compared, each a subcommand: ``python servers.py NAME --port 0``.

Every one speaks the same protocol, a 4-byte big-endian length before each packet, and does the same work: cut the
packets out of the stream, strip the header, hand the payload over, send header and payload back. Each is written the
way its library wants to be used. All listen on 127.0.0.1 with the same backlog, all set TCP_NODELAY (asyncio and uvloop
do by themselves), all refuse a length above ``--max-packet``; only the C server, the ceiling, knows of no packets.

When a server listens it prints one line, ``ready NAME 127.0.0.1:PORT``. If its library is not installed it prints
``missing NAME: why`` instead and exits with status 3. With ``--broadcast`` each packet goes to every connection instead
of back to its sender, where a server can do that.

The file runs on Linux and on Windows' Python; proactor (asyncio's) and winloop exist on Windows only. There ``--counted``
counts the calls of the system: see calls.py.
"""
import argparse
import os
import socket
import struct
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
MISSING = 3            # exit status of a server whose library is not installed
BACKLOG = 4096         # Linux' own limit (net.core.somaxconn) since 5.4: no connection of a burst is refused
HEADER = struct.Struct("!I")


def ready(name, port):
    """Tell whoever started this process that the port answers."""
    print("ready %s 127.0.0.1:%d" % (name, port), flush=True)


def raise_file_limit():
    """Let this process hold as many connections as the system lets it."""
    try:
        import resource
    except ImportError:     # Windows has no such limit
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listening_socket(port):
    """A bound, listening socket for the libraries that take one ready made."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(BACKLOG)
    return sock


# ---- leviathan ---------------------------------------------------------------------------------------------------


def serve_leviathan(options):
    """The echo of leviathan's own README, on as many threads as asked for (0: its default)."""
    import leviathan

    def echo(session, packet):
        session.send(packet)

    def to_all(session, packet):
        session.communicator.broadcast(packet)

    framing = leviathan.LengthPrefix(4, max_packet=4 + options.max_packet)      # its limit counts the header too
    queue = {"queue": leviathan.EventQueue(threads=options.threads)} if options.threads else {}
    server = leviathan.Communicator(framing, to_all if options.broadcast else echo, **queue)
    listener = server.listen(options.port)
    ready(options.name, listener.address[1])
    leviathan.run(server)


# ---- asyncio, uvloop and winloop, protocols ----------------------------------------------------------------------


def natural_protocol(options):
    """The Protocol class a competent author writes for this job; it runs on every event loop alike."""
    import asyncio
    max_packet = options.max_packet
    pack, unpack_from = HEADER.pack, HEADER.unpack_from
    transports = set()

    class Natural(asyncio.Protocol):
        """Cuts packets out of the stream; each packet is answered by one write of header and payload."""

        def connection_made(self, transport):
            self.transport = transport
            self.rest = bytearray()     # the beginning of a packet that is not complete yet
            self.need = 4
            transports.add(transport)

        def connection_lost(self, exc):
            transports.discard(self.transport)

        def data_received(self, data):
            rest = self.rest
            if rest:
                rest += data
                if len(rest) < self.need:
                    return
                data = rest
            start, end = 0, len(data)
            self.need = 4
            while end - start >= 4:
                length, = unpack_from(data, start)
                if length > max_packet:
                    self.transport.abort()
                    return
                stop = start + 4 + length
                if stop > end:
                    self.need = 4 + length
                    break
                self.packet(bytes(memoryview(data)[start + 4:stop]) if data is rest else data[start + 4:stop])
                start = stop
            if data is rest:
                del rest[:start]
            elif start < end:
                rest += data[start:]

        def packet(self, payload):
            self.transport.write(pack(len(payload)) + payload)

    class Broadcasting(Natural):
        """The same; each packet goes to every connection."""

        def packet(self, payload):
            frame = pack(len(payload)) + payload
            for transport in transports:
                transport.write(frame)

    class Joined(Natural):
        """The same; the replies to what one data_received brought are joined by hand and leave in one write."""

        def connection_made(self, transport):
            super().connection_made(transport)
            self.replies = []

        def data_received(self, data):
            super().data_received(data)
            if self.replies:
                self.transport.write(b"".join(self.replies))
                self.replies.clear()

        def packet(self, payload):
            self.replies += (pack(len(payload)), payload)

    if options.broadcast:
        return Broadcasting
    return Joined if options.name.endswith("-joined") else Natural


def run_loop(options, main):
    """Run the coroutine function on the event loop the server's name begins with."""
    import asyncio
    if options.name.startswith("uvloop"):
        import uvloop
        loop = uvloop.new_event_loop()
    elif options.name.startswith("winloop"):
        import winloop
        loop = winloop.new_event_loop()
    elif options.name.startswith("proactor"):
        from asyncio import ProactorEventLoop       # Windows alone has it
        loop = ProactorEventLoop()
    else:
        loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(main())


def serve_protocol(options):
    """A Protocol on asyncio, on uvloop or on winloop."""
    import asyncio
    factory = natural_protocol(options)

    async def main():
        server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", options.port, backlog=BACKLOG)
        ready(options.name, server.sockets[0].getsockname()[1])
        await server.serve_forever()

    run_loop(options, main)


def serve_streams(options):
    """The streams interface of asyncio, on asyncio or on uvloop."""
    import asyncio

    async def client(reader, writer):
        try:
            while True:
                length, = HEADER.unpack(await reader.readexactly(4))
                if length > options.max_packet:
                    break
                payload = await reader.readexactly(length)
                writer.write(HEADER.pack(length) + payload)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def main():
        server = await asyncio.start_server(client, "127.0.0.1", options.port, backlog=BACKLOG)
        ready(options.name, server.sockets[0].getsockname()[1])
        await server.serve_forever()

    run_loop(options, main)


# ---- a thread or a greenlet per connection -----------------------------------------------------------------------


def serve_blocking(sock, max_packet):
    """One connection, served by blocking calls until the client goes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with sock.makefile("rb") as stream:
        while True:
            header = stream.read(4)
            if len(header) < 4:
                break
            length, = HEADER.unpack(header)
            if length > max_packet:
                break
            payload = stream.read(length)
            if len(payload) < length:
                break
            sock.sendall(header + payload)


def serve_gevent(options):
    """gevent's StreamServer: a greenlet per connection."""
    from gevent.server import StreamServer

    def client(sock, address):
        try:
            serve_blocking(sock, options.max_packet)
        except OSError:
            pass

    server = StreamServer(("127.0.0.1", options.port), client, backlog=BACKLOG)
    server.start()
    ready(options.name, server.server_port)
    server.serve_forever()


def serve_socketserver(options):
    """The standard library's socketserver: a thread per connection."""
    import socketserver

    class Client(socketserver.BaseRequestHandler):
        """Serves one connection on its own thread."""

        def handle(self):
            try:
                serve_blocking(self.request, options.max_packet)
            except OSError:
                pass

    class Server(socketserver.ThreadingTCPServer):
        """Threads that do not hold up the exit."""
        request_queue_size = BACKLOG
        allow_reuse_address = True
        daemon_threads = True

    with Server(("127.0.0.1", options.port), Client) as server:
        ready(options.name, server.server_address[1])
        server.serve_forever()


# ---- Twisted -----------------------------------------------------------------------------------------------------


def serve_twisted(options):
    """Twisted's Int32StringReceiver, whose framing is this very one."""
    from twisted.internet import protocol, reactor
    from twisted.protocols.basic import Int32StringReceiver
    clients = set()

    class Echo(Int32StringReceiver):
        """Answers each packet by sendString."""
        MAX_LENGTH = options.max_packet

        def connectionMade(self):
            self.transport.setTcpNoDelay(True)
            clients.add(self)

        def connectionLost(self, reason=protocol.connectionDone):
            clients.discard(self)

        def stringReceived(self, string):
            self.sendString(string)

    class Broadcasting(Echo):
        """Sends each packet to every connection."""

        def stringReceived(self, string):
            frame = HEADER.pack(len(string)) + string
            for client in clients:
                client.transport.write(frame)

    factory = protocol.Factory.forProtocol(Broadcasting if options.broadcast else Echo)
    port = reactor.listenTCP(options.port, factory, backlog=BACKLOG, interface="127.0.0.1")
    ready(options.name, port.getHost().port)
    reactor.run()


# ---- C -----------------------------------------------------------------------------------------------------------


def serve_c(options):
    """Become the C server."""
    from build import compiled
    program = compiled("c_server.c")
    os.execv(program, [program, str(options.port)])


# name: how it is served
SERVERS = {
    "leviathan": serve_leviathan,
    "uvloop-natural": serve_protocol,
    "uvloop-joined": serve_protocol,
    "uvloop-streams": serve_streams,
    "asyncio-natural": serve_protocol,
    "asyncio-joined": serve_protocol,
    "asyncio-streams": serve_streams,
    "proactor-natural": serve_protocol,
    "proactor-joined": serve_protocol,
    "winloop-natural": serve_protocol,
    "winloop-joined": serve_protocol,
    "gevent": serve_gevent,
    "twisted": serve_twisted,
    "socketserver": serve_socketserver,
    "c": serve_c,
}
BROADCASTING = ("leviathan", "uvloop-natural", "asyncio-natural", "twisted")


def parse_arguments(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=sorted(SERVERS))
    parser.add_argument("--port", type=int, default=0, help="0, the default: any free port")
    parser.add_argument("--threads", type=int, default=0, help="leviathan only; 0, the default: its own default")
    parser.add_argument("--max-packet", type=int, default=128 << 20, metavar="BYTES")
    parser.add_argument("--broadcast", action="store_true", help="send each packet to all: " + ", ".join(BROADCASTING))
    parser.add_argument("--counted", action="store_true", help="Windows only: answer each line on stdin by the calls so far")
    options = parser.parse_args(arguments)
    if options.broadcast and options.name not in BROADCASTING:
        parser.error("%s has no --broadcast" % options.name)
    if options.counted and not (sys.platform == "win32" and options.name.startswith(("leviathan", "proactor", "winloop"))):
        parser.error("--counted is for leviathan, the proactor and winloop, on Windows")
    return options


def main():
    """Run one server until it is killed."""
    options = parse_arguments()
    raise_file_limit()
    sys.path.insert(0, os.path.dirname(HERE))       # leviathan's folder
    try:
        if options.counted:
            import calls
            calls.count(options.name)
        SERVERS[options.name](options)
    except ImportError as error:
        print("missing %s: %s" % (options.name, error), flush=True)
        sys.exit(MISSING)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
