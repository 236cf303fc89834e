"""A protocol of your own by one plain function, which says how long the next packet is.

Header: 2 bytes b"LV", 1 byte version, 1 byte kind, 2 bytes length (big-endian) of the numbers that follow, 4 bytes
each. Kind 1 asks for their sum, kind 2 for the largest; the answer has the same header and one number.

    python examples/custom_header.py --port 7878
"""
import argparse
import os
import struct
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402

HEADER = struct.Struct(">2sBBH")
WORK = {1: lambda numbers: sum(numbers) & 0xFFFFFFFF, 2: lambda numbers: max(numbers, default=0)}


def parse(view):
    """The whole length of the packet at the start of *view*; 0: not known yet. FramingError ends the session."""
    if len(view) < HEADER.size:
        return 0
    magic, version, kind, length = HEADER.unpack_from(view)
    if magic != b"LV" or version != 1 or kind not in WORK or length % 4:
        raise leviathan.FramingError("no LV header: %s" % bytes(view[:HEADER.size]).hex())
    return HEADER.size + length


def on_packet(session, packet):             # the whole packet, header and all; `send` sends as it is
    kind = packet[3]
    numbers = struct.unpack_from(">%dI" % ((len(packet) - HEADER.size) // 4), packet, HEADER.size)
    session.send(HEADER.pack(b"LV", 1, kind, 4) + struct.pack(">I", WORK[kind](numbers)))


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=7878, help="0: the system chooses")
    args = options.parse_args()

    server = leviathan.Communicator(parse, on_packet)
    try:
        listener = server.listen(args.port, args.host)
    except (OSError, ValueError) as error:      # the port is taken, or there is no such address
        options.exit(2, "%s\n" % error)
    # Runs until Ctrl-C or SIGTERM, then lets queued bytes leave.
    leviathan.run(server, on_ready=lambda: print("custom_header listens on %s" % listener, flush=True))


if __name__ == "__main__":
    main()
