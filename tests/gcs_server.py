"""Enough of the JSON API of Google Cloud Storage for TensorStore's own driver, objects in memory."""

import http.server
import json
import os
import threading
import urllib.parse


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_):
        pass

    def _answer(self, code, data=b"", headers=()):
        self.send_response(code)
        for name, value in (*headers, ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(url.path.rsplit("/o/", 1)[-1])
        if name not in self.server.objects:
            return self._answer(404)
        data, generation = self.server.objects[name]
        headers = [("x-goog-generation", str(generation))]
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}"))
            return self._answer(206, data[start:stop], headers)
        return self._answer(200, data, headers)

    def do_POST(self):
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        data = self.rfile.read(int(self.headers["Content-Length"]))
        before = self.server.objects.get(query["name"], (b"", 0))[1]
        if query.get("ifGenerationMatch", str(before)) != str(before):
            return self._answer(412)
        self.server.objects[query["name"]] = data, before + 1
        answer = {"name": query["name"], "generation": str(before + 1), "size": str(len(data))}
        return self._answer(200, json.dumps(answer).encode())


class Server(http.server.ThreadingHTTPServer):
    """Serves from a thread; TensorStore in this process and its children finds it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{self.server_address[1]}"
        os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
        threading.Thread(target=self.serve_forever, daemon=True).start()
