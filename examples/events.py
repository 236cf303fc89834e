"""A queue for events alone: no sockets, no SessionManager. Work posted to idle threads, timers, and an orderly end.

    python examples/events.py --seconds 1
"""
import argparse
import os
import signal
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=1.0, help="how long it runs")
    args = options.parse_args()
    if not args.seconds > 0:
        options.exit(2, "--seconds is %s; it must be more than 0\n" % args.seconds)
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *unused: done.set())

    def say(line):                          # in one piece: print() writes the line's end apart, and others write between
        print(line + "\n", end="", flush=True)

    def work(number):                       # on whichever of the two threads is idle
        time.sleep(0.05)
        say("job %d done by %s" % (number, threading.current_thread().name))

    def tick():
        say("tick")

    queue = leviathan.EventQueue(threads=2, name="worker")
    queue.start()
    for number in range(4):
        queue.post(work, number)
    ticker = queue.every(args.seconds / 5, tick)        # never twice at once; a late one is not made up for
    never = queue.call_later(3600, print, "nobody waits for this")
    never.cancel()
    queue.call_later(args.seconds, done.set)
    while not done.wait(0.2):               # Windows runs no signal handler during a wait without an end
        pass
    ticker.cancel()
    queue.stop()                            # runs what is still posted, then ends the threads
    print("%(events)d events on %(threads)d threads" % queue.statistics())


if __name__ == "__main__":
    main()
