"""A chat for `nc` or telnet: packets are lines, everybody gets them, and everybody is told who left and why.

    python examples/chat_server.py --port 7878        and then, as often as you like:  nc 127.0.0.1 7878
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402


def on_connect(session):
    session.send(b"your name?")


def on_line(session, line):
    line = line.strip()                         # telnet ends its lines with \r\n
    chat = session.communicator
    if not line:
        return
    if session.tag is None:                     # tag and data are the user's; here the tag is the name
        session.tag = line[:20]
        chat.broadcast(b"* %b is here, %d in the room" % (session.tag, len(chat.sessions)))
    elif line == b"/quit":
        session.send(b"bye")
        session.close()                         # after "bye" was sent
    else:
        chat.broadcast(b"<%b> %b" % (session.tag, line))


def on_disconnect(session, reason, error):
    if session.tag is not None:                 # normal, timeout, error, protocol, overflow or shutdown
        session.communicator.broadcast(b"* %b left (%b)" % (session.tag, reason.value.encode()))


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=7878, help="0: the system chooses")
    options.add_argument("--idle", type=float, default=600.0, help="seconds of silence after which one is out")
    args = options.parse_args()

    try:
        chat = leviathan.Communicator(leviathan.Delimited(b"\n", max_packet=1024), on_line, on_connect=on_connect,
                                      on_disconnect=on_disconnect, idle_timeout=args.idle)
        listener = chat.listen(args.port, args.host)
    except (OSError, ValueError) as error:      # the port is taken, or there is no such address or time
        options.exit(2, "%s\n" % error)
    # Runs until Ctrl-C or SIGTERM, then lets queued bytes leave.
    leviathan.run(chat, on_ready=lambda: print("chat_server listens on %s" % listener, flush=True))


if __name__ == "__main__":
    main()
