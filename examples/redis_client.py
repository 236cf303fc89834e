"""A client of a real Redis: pipelines on one connection, on which it reconnects when Redis goes and comes back.

    python examples/redis_client.py --port 6379 --every 1
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=6379)
    options.add_argument("--every", type=float, default=1.0, help="seconds between two pipelines")
    options.add_argument("--count", type=int, default=0, help="pipelines before it ends; 0: until Ctrl-C")
    args = options.parse_args()
    redis = leviathan.Resp("client")
    answered = []

    def pipeline():
        if link.session is not None:                # None while Redis is away
            redis.call(link.session, leviathan.Pipeline([
                ["INCR", "leviathan:visits"], ["SET", "leviathan:last", "now", "EX", 60], ["GET", "leviathan:last"],
                ["LPUSH", "leviathan:visits", "wrong type"]]), on_replies)

    def on_replies(session, replies):
        if isinstance(replies, ConnectionError):    # the connection ended first; was it done? nobody knows
            print("unanswered: %s" % replies, flush=True)
            return
        visits, status, last, error = replies       # an error is a value like the others
        if isinstance(visits, leviathan.RespError):             # LOADING, NOAUTH, OOM ...
            print("refused: %s" % visits.message, flush=True)
            return
        print("visit %d, %s %s, %s" % (visits, status, last.decode(), error.code), flush=True)
        answered.append(visits)
        if len(answered) == args.count:
            client.close()                          # the last session gone, run() returns

    def on_connect(session):
        print("connected to %s:%d" % session.peer, flush=True)
        pipeline()

    def on_disconnect(session, reason, error):
        print("disconnected from %s:%d" % session.peer, flush=True)

    client = leviathan.Communicator(redis, lambda session, reply: None, on_connect=on_connect,
                                    on_disconnect=on_disconnect, queue=leviathan.EventQueue(1))
    try:
        link = client.connect(args.host, args.port, reconnect=(0.1, 2.0))
        client.queue.every(args.every, pipeline)
    except ValueError as error:                     # there is no such port, or no such pause
        options.exit(2, "%s\n" % error)
    leviathan.run(client)


if __name__ == "__main__":
    main()
