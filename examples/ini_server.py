"""Two servers from an INI file: queues, headers and limits come from ini_server.ini, code only where it is needed.

[COMUNICATOR_1] gets its handler and its address here, [COMUNICATOR_2] has both in the file.

    python examples/ini_server.py --port 7878
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402

INI = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ini_server.ini")


def shout(session, packet):
    session.send(packet.upper())


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=7878, help="0: the system chooses")
    options.add_argument("--ini", default=INI)
    args = options.parse_args()

    try:
        servers = leviathan.CommunicatorList.from_ini(args.ini, handlers={1: shout})
        servers.by_number[1].listen(args.port, args.host)
    except (leviathan.ConfigError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)

    def ready():                            # all threads run, and signals are heeded
        for number, server in sorted(servers.by_number.items()):
            for listener in server.listeners:
                print("[COMUNICATOR_%d] listens on %s" % (number, listener), flush=True)

    servers.run(on_ready=ready)


if __name__ == "__main__":
    main()
