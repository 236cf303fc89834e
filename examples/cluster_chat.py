"""A chat on several machines: each runs this server, and a real Redis' publish/subscribe joins them to one room.

    python examples/cluster_chat.py --port 7878 --redis 127.0.0.1:6379        on each machine, then:  nc MACHINE 7878

Redis may be stopped and started again: clients stay, and messages flow again.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402

CHANNEL = "leviathan:chat"


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
    options.add_argument("--redis", type=address, default="127.0.0.1:6379", metavar="HOST:PORT")
    args = options.parse_args()
    queue = leviathan.EventQueue(1)                     # one thread serves the clients and the link

    def tell(line):         # in one piece: print() writes the line's end apart, and run()'s thread and the queue's both tell
        print(line + "\n", end="", flush=True)

    # -- the link to Redis. In RESP3 one connection can subscribe and publish.

    def on_push(session, push):
        if push.kind == b"message":
            chat.broadcast(push[2].replace(b"\n", b" "))  # from any machine, and from whoever else publishes

    def on_subscribed(session, reply):
        if isinstance(reply, leviathan.Push):
            tell("joined at %s:%d" % session.peer)
            chat.broadcast(b"* the room is whole")

    def on_link(session):
        redis.call(session, ["HELLO", 3])
        redis.call(session, ["SUBSCRIBE", CHANNEL], on_subscribed)

    def on_link_lost(session, reason, error):
        tell("lost %s:%d" % session.peer)
        chat.broadcast(b"* the other machines cannot hear us")

    def say(line):
        session = link.session
        if session is None or not redis.call(session, ["PUBLISH", CHANNEL, line]):
            chat.broadcast(line)                        # at least those who are here

    # -- the clients

    def on_line(session, line):
        line = line.strip()
        if line and session.tag is None:
            session.tag = line[:20]
            say(b"* %b is here" % session.tag)
        elif line:
            say(b"<%b> %b" % (session.tag, line))

    def on_disconnect(session, reason, error):
        if session.tag is not None:
            say(b"* %b left" % session.tag)

    redis = leviathan.Resp("client", on_push=on_push)
    links = leviathan.Communicator(redis, lambda session, reply: None, on_connect=on_link, on_disconnect=on_link_lost,
                                   queue=queue, max_clients=0)
    chat = leviathan.Communicator(leviathan.Delimited(b"\n", max_packet=1024), on_line, on_disconnect=on_disconnect,
                                  on_connect=lambda session: session.send(b"your name?"), queue=queue)
    link = links.connect(*args.redis, reconnect=(0.1, 2.0))
    try:
        listener = chat.listen(args.port, args.host)
    except (OSError, ValueError) as error:      # the port is taken, or there is no such address
        options.exit(2, "%s\n" % error)
    leviathan.run(chat, links, on_ready=lambda: tell("cluster_chat listens on %s" % listener))


if __name__ == "__main__":
    main()
