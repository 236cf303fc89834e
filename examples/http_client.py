"""A client for HTTP: sends several requests at once over one connection, prints the answers in their order, and ends.

    python examples/http_client.py --port 8080 / /slow /json
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8080)
    options.add_argument("--post", metavar="TEXT", help="POST it instead of a GET")
    options.add_argument("targets", nargs="*", default=["/"])
    args = options.parse_args()
    answers, problems = [], []

    def on_connect(session):
        for target in args.targets:         # pipelined: nobody waits for an answer here
            if args.post is None:
                session.send(leviathan.Request("GET", target))
            else:
                session.send(leviathan.Request("POST", target, {"Content-Type": "text/plain"}, args.post))

    def on_response(session, response):
        print("%s: %d %s" % (response.request.target, response.status, response.body.decode("utf-8", "replace").strip()),
              flush=True)
        answers.append(response)
        if len(answers) == len(args.targets):
            client.close()                  # the last session gone, run() returns

    def on_disconnect(session, reason, error):
        if len(answers) < len(args.targets):
            problems.append("%d answers are missing: %s" % (len(args.targets) - len(answers), error or reason.value))
        client.close()

    def on_failure(connector, error):
        problems.append("cannot connect to %s:%d: %s" % (args.host, args.port, error))
        client.close()

    client = leviathan.Communicator(leviathan.Http("client"), on_response, on_connect=on_connect, on_disconnect=on_disconnect)
    try:
        client.connect(args.host, args.port, timeout=5, on_failure=on_failure)
    except ValueError as error:             # there is no such port
        options.exit(2, "%s\n" % error)
    leviathan.run(client)
    if problems:
        sys.exit(problems[0])


if __name__ == "__main__":
    main()
