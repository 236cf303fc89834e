"""Queues split by role: one accepts, one serves the clients, one keeps the connection to another server.

A client sends a line; it goes to the upstream server with a ticket number before it, and the answer goes back to the
client the ticket was for. Without --upstream the example starts an upstream of its own, which shouts.

    python examples/roles.py --port 7878        and then:  nc 127.0.0.1 7878
"""
import argparse
import itertools
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402

tickets = itertools.count(1)
waiting = {}                                # {ticket: session of the client that waits for the answer}


def shout(session, line):                   # the upstream server's part: "7 hello" -> "7 HELLO"
    session.send(line.upper())


def address(text):
    """host:port or [IPv6 address]:port; of a ValueError argparse makes a message, and exit status 2."""
    host, _, port = text.rpartition(":")
    if not host or not 0 < int(port) < 65536:
        raise ValueError
    return host.strip("[]"), int(port)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=7878, help="0: the system chooses")
    options.add_argument("--upstream", type=address, metavar="HOST:PORT")
    args = options.parse_args()
    lines = leviathan.Delimited(b"\n")

    def ask(session, line):                 # on one of the clients' threads
        ticket = next(tickets)
        question = b"%d %b" % (ticket, line.strip())
        if len(question) >= lines.max_packet:           # the upstream would close, and all would lose it
            session.send(b"this line is too long")
            return
        waiting[ticket] = session
        link = next(iter(upstream.sessions), None)      # there is one at most
        if link is None or not link.send(question):
            sorry(ticket)

    def sorry(ticket):
        client = waiting.pop(ticket, None)  # None: somebody else was faster
        if client is not None:
            client.send(b"the upstream is down")

    def answer(session, line):              # on one of the upstream's threads; send() may be called from any
        ticket, _, text = line.partition(b" ")
        client = waiting.pop(int(ticket), None)
        if client is not None:
            client.send(text)               # False if that client has gone: its session is nobody else's now

    def connected(session):                 # the first time, and after each reconnection
        print("the upstream is there", flush=True)

    def lost(session, reason, error):       # what it was asked it will not answer any more
        for ticket in list(waiting):
            sorry(ticket)

    accepting = leviathan.EventQueue(1, name="accept")
    clients = leviathan.Communicator(lines, ask, queue=leviathan.EventQueue(4, name="clients"), name="clients")
    upstream = leviathan.Communicator(lines, answer, queue=leviathan.EventQueue(2, name="upstream"), name="upstream",
                                      on_connect=connected, on_disconnect=lost)
    gate = leviathan.Communicator(lines, ask, queue=accepting, name="gate")         # accepts only: see serve=
    servers = leviathan.CommunicatorList(gate, clients, upstream)
    if not args.upstream:
        shouter = leviathan.Communicator(lines, shout, queue=accepting, name="shouter")
        servers.add(shouter)
        args.upstream = shouter.listen(0).address
    try:
        listener = gate.listen(args.port, args.host, serve=clients)
    except (OSError, ValueError) as error:      # the port is taken, or there is no such address
        options.exit(2, "%s\n" % error)

    def ready():
        print("roles listens on %s" % listener, flush=True)
        upstream.connect(*args.upstream, reconnect=True)

    servers.run(on_ready=ready)


if __name__ == "__main__":
    main()
