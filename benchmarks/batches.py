"""The Redis clients that are compared: batches of 100 commands, one after the other on one connection.

    python benchmarks/batches.py NAME PORT SECONDS WARMUP       NAME: leviathan, leviathan-ask, redis-py

Each batch is made anew, SET and GET by turns with values of 64 bytes, sent in one go, and its replies are compared with
what they must be. Prints what was measured as JSON; a wrong reply is a message and exit status 1.
"""
import json
import os
import sys
import threading
import time

HOST = "127.0.0.1"
KEYS = ["key:%d" % number for number in range(50)]
VALUE = b"0123456789abcdef" * 4
PATIENCE = 10.0         # seconds until a batch must be answered


class Meter:
    """Takes the replies to each batch, and says whether another one is wanted."""

    def __init__(self, expected, seconds, warmup):
        self.expected, self.seconds, self.warmup = expected, seconds, warmup
        self.times = []         # seconds of each batch, since the warm-up
        self.wrong = None       # the first replies that were not as expected
        self.counted_from = None
        self.begun = self.last = time.perf_counter()

    def goes_on(self, replies):
        """Note that a batch was answered; True if there is time for one more."""
        now, cpu = time.perf_counter(), time.process_time()
        if replies != self.expected:
            self.wrong = replies
            return False
        if self.counted_from is not None:
            self.times.append(now - self.last)
        elif now - self.begun >= self.warmup:
            self.counted_from, self.cpu_from = now, cpu
        self.last, self.cpu = now, cpu
        return self.counted_from is None or now - self.counted_from < self.seconds

    def result(self):
        """{figure: number}; ends the program if there was a wrong reply, or none."""
        ordered = sorted(self.times)
        if self.wrong is not None or not ordered:
            sys.exit("wrong replies: %.200r" % (self.wrong,))
        return {"commands": len(ordered) * len(self.expected), "seconds": self.last - self.counted_from,
                "cpu": self.cpu - self.cpu_from, "p50_us": ordered[len(ordered) // 2] * 1e6,
                "p99_us": ordered[len(ordered) * 99 // 100] * 1e6}


def run_leviathan(port, meter, load):
    """Connect, and let one of the functions below do the work."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import leviathan

    def batch():
        commands = leviathan.Pipeline()
        for key in KEYS:
            commands.append(["SET", key, VALUE])
            commands.append(["GET", key])
        return commands

    redis = leviathan.Resp("client")
    client = leviathan.Communicator(redis, lambda session, reply: None)
    connector = client.connect(HOST, port)
    running = leviathan.CommunicatorList(client)
    running.start()
    try:
        load(redis, connector.wait(PATIENCE), batch, meter)
    finally:
        running.stop()
    return meter.result()


def by_callbacks(redis, session, batch, meter):
    """Each batch is sent by the callback of the one before, on the queue's thread."""
    done = threading.Event()

    def on_replies(session, replies):
        if not meter.goes_on(replies) or not redis.call(session, batch(), on_replies):
            done.set()

    if redis.call(session, batch(), on_replies):
        done.wait()


def by_asking(redis, session, batch, meter):
    """This thread waits for each batch."""
    while meter.goes_on(redis.ask(session, batch(), PATIENCE)):
        pass


def run_redis_py(port, meter):
    """The redis package, its parser in Python too."""
    sys.modules["hiredis"] = None       # as if it were not installed
    import redis

    client = redis.Redis(HOST, port)
    while True:
        pipeline = client.pipeline(transaction=False)
        for key in KEYS:
            pipeline.set(key, VALUE)
            pipeline.get(key)
        if not meter.goes_on(pipeline.execute()):
            return meter.result()


def main():
    """Measure one client once."""
    name, port, seconds, warmup = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    ok = True if name == "redis-py" else "OK"
    meter = Meter([ok, VALUE] * len(KEYS), seconds, warmup)
    if name == "redis-py":
        result = run_redis_py(port, meter)
    else:
        result = run_leviathan(port, meter, by_callbacks if name == "leviathan" else by_asking)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
