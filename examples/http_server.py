"""A web server: text, JSON, an upload echoed, an answer in pieces, and one that another thread gives later.

    python examples/http_server.py --port 8080
    curl http://127.0.0.1:8080/slow
"""
import argparse
import json
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402
from leviathan import Response  # noqa: E402


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8080, help="0: the system chooses")
    args = options.parse_args()
    later = leviathan.EventQueue(2, name="later")       # for what takes long: it would hold up everybody here

    def work(request):                      # on a thread of that queue
        time.sleep(0.2)
        request.reply("that took a while\n")            # in its turn, even if requests behind it were answered before

    def count(request):
        with request.stream(200, {"Content-Type": "text/plain"}) as stream:
            for number in range(1, 6):
                stream.write("%d\n" % number)

    def handle(session, request):           # on the session's thread, once the request is whole
        if request.path == "/":
            request.reply("Hello from leviathan\n")
        elif request.path == "/echo":
            request.reply(Response(200, {"Content-Type": request.headers.get("Content-Type", "text/plain")}, request.body))
        elif request.path == "/json":
            facts = {"method": request.method, "query": request.query, "headers": dict(request.headers.items())}
            request.reply(Response(200, {"Content-Type": "application/json"}, json.dumps(facts) + "\n"))
        elif request.path == "/stream":
            later.post(count, request)
        elif request.path == "/slow":
            later.post(work, request)
        else:
            request.reply(Response(404, None, "there is no %s here\n" % request.path))

    server = leviathan.Communicator(leviathan.Http(max_body=16 << 20), handle, idle_timeout=60)
    try:
        listener = server.listen(args.port, args.host)
    except (OSError, ValueError) as error:      # the port is taken, or there is no such address
        options.exit(2, "%s\n" % error)
    leviathan.run(server, later, on_ready=lambda: print("http_server listens on http://%s/" % listener, flush=True))


if __name__ == "__main__":
    main()
