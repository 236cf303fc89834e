"""The smallest useful server: packets behind a 4-byte big-endian length; the handler gets each without its header.

    python examples/echo_server.py --port 7878
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402


def echo(session, packet):
    session.send(packet)        # the framing puts the header back


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=7878, help="0: the system chooses")
    args = options.parse_args()

    server = leviathan.Communicator(leviathan.LengthPrefix(4), echo)
    try:
        listener = server.listen(args.port, args.host)
    except (OSError, ValueError) as error:      # the port is taken, or there is no such address
        options.exit(2, "%s\n" % error)
    # Runs until Ctrl-C or SIGTERM, then lets queued bytes leave.
    leviathan.run(server, on_ready=lambda: print("echo_server listens on %s" % listener, flush=True))


if __name__ == "__main__":
    main()
