"""The web servers that are compared: "Hello, World!" by leviathan, and the same as an ASGI and a WSGI application.

    python benchmarks/hello.py PORT [heads kept, 0: none]       leviathan; the others run hello:asgi or hello:wsgi

All answer every request by 200, a Content-Type and 13 bytes, without looking at it; all read every header.
"""
import os
import sys

TEXT = b"Hello, World!"


async def asgi(scope, receive, send):
    """For uvicorn and granian."""
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(TEXT))]})
    await send({"type": "http.response.body", "body": TEXT})


def wsgi(environ, start_response):
    """For waitress."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(TEXT)))])
    return [TEXT]


def main():
    """Serve by leviathan."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import leviathan

    def hello(session, request):
        session.send(leviathan.Response(200, {"Content-Type": "text/plain"}, TEXT))

    framing = leviathan.Http(heads_kept=int(sys.argv[2])) if len(sys.argv) > 2 else leviathan.Http()
    server = leviathan.Communicator(framing, hello)
    server.listen(int(sys.argv[1]))
    leviathan.run(server)


if __name__ == "__main__":
    main()
