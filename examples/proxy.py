"""A TCP proxy: for every client a connection to the target, bytes both ways, and no side is read faster than the
other one takes it.

    python examples/proxy.py --port 7879 --target 127.0.0.1:7878
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402

# A session's `data` is the session on the other side; a client whose target is not connected yet has its Connector in
# `tag`. All of it runs on one queue with one thread, so none of it needs a lock.


def forward(session, data):
    session.data.write(data)


def half_close(session):                        # on_eof: this side sends no more, the other one is told
    session.data.finish()


def pressure(session, congested):               # too much is unsent here: stop reading at the other side
    if congested:
        session.data.pause()
    else:
        session.data.resume()


def part(session, reason, error):               # on_disconnect, for either side
    if session.data is None:
        session.tag.close()                     # still connecting
    elif reason in (leviathan.Reason.NORMAL, leviathan.Reason.SHUTDOWN):
        session.data.close()
    else:
        session.data.abort()                    # a broken connection is passed on as one


def address(text):
    """host:port or [IPv6 address]:port; of a ValueError argparse makes a message, and exit status 2."""
    host, _, port = text.rpartition(":")
    if not host or not 0 < int(port) < 65536:
        raise ValueError
    return host.strip("[]"), int(port)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=7879, help="0: the system chooses")
    options.add_argument("--target", type=address, default="127.0.0.1:7878", metavar="HOST:PORT")
    args = options.parse_args()

    def on_client(client):
        client.pause()                          # nothing is read before there is somewhere to put it
        client.tag = targets.connect(*args.target, tag=client, timeout=5,
                                     on_failure=lambda connector, error: client.abort())

    def on_target(target):
        client = target.tag
        target.data, client.data = client, target
        client.resume()

    both = dict(queue=leviathan.EventQueue(1), on_eof=half_close, on_backpressure=pressure, on_disconnect=part)
    clients = leviathan.Communicator(leviathan.Raw(), forward, on_connect=on_client, name="clients", **both)
    targets = leviathan.Communicator(leviathan.Raw(), forward, on_connect=on_target, name="targets", **both)
    try:
        listener = clients.listen(args.port, args.host)
    except (OSError, ValueError) as error:      # the port is taken, or there is no such address
        options.exit(2, "%s\n" % error)
    # Runs until Ctrl-C or SIGTERM, then lets queued bytes leave.
    leviathan.run(clients, targets, on_ready=lambda: print("proxy listens on %s" % listener, flush=True))


if __name__ == "__main__":
    main()
