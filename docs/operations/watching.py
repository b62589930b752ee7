"""What watch_retention.py asks a development server with: requests, tokens, tails
by WebSocket, and a receiver of webhooks. Standard library only."""

import base64
import hashlib
import hmac
import http.client
import http.server
import json
import os
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import zlib


class Server:
    """A region of a server that was started with serve --dev."""

    def __init__(self, path, region="eu"):
        values = json.load(open(path))["regions"][region]
        self.folder = os.path.dirname(os.path.abspath(path))
        self.operator = values["COFFER_OPERATOR_TOKEN"]
        self.app, self.token = values["COFFER_APP"], values["COFFER_TOKEN"]
        self.address = urllib.parse.urlsplit(values["COFFER_URL"])
        self.tls = ssl.create_default_context(cafile=values["COFFER_CA"])
        self.connection = None

    def ask(self, method, path, token, body=None, **headers):
        """Returns status and content; a connection that has gone is made again."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers["Authorization"] = "Bearer " + token
        if isinstance(body, (dict, list)):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        for last in (False, True):
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPSConnection(self.address.netloc, context=self.tls, timeout=30)
                self.connection.request(method, path, body, headers)
                answer = self.connection.getresponse()
                return answer.status, answer.read()
            except (http.client.HTTPException, OSError):
                self.connection.close()
                self.connection = None
                if last:
                    raise

    def must(self, method, path, token, body=None, **headers):
        """Returns what the answer says, in JSON."""
        return json.loads(self.content(method, path, token, body, **headers))

    def content(self, method, path, token, body=None, **headers):
        """Returns the content of an answer that must be one of success."""
        status, text = self.ask(method, path, token, body, **headers)
        if status // 100 != 2:
            sys.exit(f"{method} {path}: {status} {text.decode()}")
        return text

    def websocket(self, path, token):
        """Everything that a tail sends until it ends (RFC 6455)."""
        with ssl_socket(self) as socket:
            key = base64.b64encode(os.urandom(16)).decode()
            socket.sendall((
                f"GET {path} HTTP/1.1\r\nHost: {self.address.netloc}\r\nAuthorization: Bearer {token}\r\n"
                "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                f"Sec-WebSocket-Key: {key}\r\n\r\n").encode())
            stream = socket.makefile("rb")
            status = int(stream.readline().split()[1])
            while stream.readline() not in (b"\r\n", b""):
                pass
            if status != 101:
                return status, b""
            content = b""
            while True:
                head = stream.read(2)
                if len(head) < 2 or head[0] & 15 == 8:  # closed
                    return 200, content
                size = head[1] & 127
                if size > 125:
                    size = int.from_bytes(stream.read(2 if size == 126 else 8), "big")
                content += stream.read(size) + b"\n"


def ssl_socket(server):
    import socket

    plain = socket.create_connection((server.address.hostname, server.address.port), timeout=30)
    return server.tls.wrap_socket(plain, server_hostname=server.address.hostname)


class Receiver:
    """An endpoint on this machine. It shows the certificate that the development
    server trusts for webhooks, answers verifications, and keeps what it was sent. The
    first request of an app it refuses, so that there is an answer to be kept."""

    def __init__(self, folder):
        receiver = self
        self.bodies, refused = [], set()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer, status, source = b"", 200, find(json.loads(body), "source")
                if challenge := find(json.loads(body), "challenge"):
                    answer = json.dumps({"challenge": challenge}).encode()
                elif source not in refused:
                    refused.add(source)
                    answer, status = b"refused once", 503
                else:
                    receiver.bodies.append(body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(os.path.join(folder, "listen.pem"), os.path.join(folder, "listen.key"))
        self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def count(self, *texts):
        """How many requests had all the texts."""
        return len([body for body in self.bodies if all(text in body for text in texts)])


class App:
    """A new app of a plan, with an endpoint."""

    def __init__(self, server, receiver, plan):
        made = server.must("POST", "/v1/admin/apps", server.operator, {"name": plan, "plan": plan})
        self.id, self.certificate = made["id"], made["certificates"][0]
        self.token, self.base = build_token(self.id, self.certificate), "/v1/apps/" + self.id
        self.endpoint = server.must("POST", self.base + "/endpoints", self.token, {"url": receiver.url, "mode": "full"})["id"]


def find(value, name):
    """The member of a JSON object that has the name, however deep."""
    if isinstance(value, dict):
        if name in value:
            return value[name]
        return next((found for v in value.values() if (found := find(v, name)) is not None), None)
    return None


def build_token(app, certificate, user=""):
    """An AccessToken2 with the privilege of an app, or of a user, as docs/api/guide.md
    has it."""

    def string(b):
        return struct.pack("<H", len(b)) + b

    issued, life, salt = int(time.time()), 3600, struct.unpack("<I", os.urandom(4))[0]
    info = string(app.encode()) + struct.pack("<IIIH", issued, life, salt, 1)
    info += struct.pack("<HHHI", 5, 1, 1 if user else 2, life) + string(user.encode())
    mac = lambda key, text: hmac.new(key, text, hashlib.sha256).digest()
    key = mac(struct.pack("<I", salt), mac(struct.pack("<I", issued), certificate.encode()))
    return "007" + base64.b64encode(zlib.compress(string(mac(key, info)) + info)).decode()


def seconds(text):
    for unit, factor in (("ms", 0.001), ("s", 1), ("m", 60), ("h", 3600)):
        if text.endswith(unit):
            return float(text[: -len(unit)]) * factor
    sys.exit("a day is a time such as 2s")
