"""A client: connects out, sends a few packets at once, prints the answers and ends. It talks to echo_server.

    python examples/echo_client.py --port 7878 hello world
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=7878)
    options.add_argument("words", nargs="*", default=["hello", "leviathan"])
    args = options.parse_args()
    missing = list(args.words)
    problems = []

    def on_connect(session):
        for word in args.words:
            session.send(word.encode())     # these leave together, in one system call

    def on_packet(session, packet):
        print("%s answers %s" % (session.peer[0], packet.decode()), flush=True)
        missing.pop()
        if not missing:
            client.close()                  # the last session gone, run() returns

    def on_disconnect(session, reason, error):
        if missing:
            problems.append("%d answers are missing: %s" % (len(missing), error or reason.value))
        client.close()

    def on_failure(connector, error):
        problems.append("cannot connect to %s:%d: %s" % (args.host, args.port, error))
        client.close()

    client = leviathan.Communicator(leviathan.LengthPrefix(4), on_packet, on_connect=on_connect,
                                    on_disconnect=on_disconnect)
    try:
        client.connect(args.host, args.port, timeout=5, on_failure=on_failure)
    except ValueError as error:             # there is no such port
        options.exit(2, "%s\n" % error)
    leviathan.run(client)
    if problems:
        sys.exit(problems[0])


if __name__ == "__main__":
    main()
