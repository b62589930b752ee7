#!/usr/bin/env python3
"""Watches data arrive, stay and go on a server whose days are short.

    coffer serve --dev --data /tmp/fast --day 2s --port-base 0 &
    python3 docs/operations/watch_retention.py /tmp/fast/dev.json 2s

It makes an app of each plan, stores a message and an attachment,
and reads them by every route until each has gone. It fails when one goes before
its end, or is read a tick after it. With --all it goes on for 180 of the
server's days, with the plans pro and enterprise. Standard library only.
"""

import json, ssl, sys, time, urllib.request, urllib.error

TICK = 0.25  # what the network and this program may take


def main(path, day, plans):
    region = json.load(open(path))["regions"]["eu"]
    tls = ssl.create_default_context(cafile=region["COFFER_CA"])

    def ask(method, path, token, body=None, media="application/json"):
        data = body.encode() if isinstance(body, str) else body
        request = urllib.request.Request(region["COFFER_URL"] + path, data, method=method)
        request.add_header("Authorization", "Bearer " + token)
        if data is not None:
            request.add_header("Content-Type", media)
        try:
            with urllib.request.urlopen(request, context=tls, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read()

    def must(method, path, token, body=None, media="application/json"):
        status, text = ask(method, path, token, body, media)
        if status // 100 != 2:
            sys.exit(f"{method} {path}: {status} {text.decode()}")
        return text

    operator = region["COFFER_OPERATOR_TOKEN"]
    failed = 0
    watched = []  # name, life in days, its routes, when it was stored
    for plan, life in plans:
        app = json.loads(must("POST", "/v1/admin/apps", operator, json.dumps({"name": plan, "plan": plan})))
        token = build_token(app["id"], app["certificates"][0])
        base = "/v1/apps/" + app["id"]
        before = time.time()
        stored = json.loads(must("POST", base + "/events", token, json.dumps({
            "id": "m1", "type": "message.sent", "sender": "ann", "recipient": "ben",
            "data": {"bodies": [{"type": "txt", "msg": "watched"}]}})))
        after = time.time()
        must("GET", base + "/users/ben/inbox?min_position=" + stored["position"], token)
        watched.append((f"message, plan {plan}", life, token, [
            base + "/events", base + "/events/m1", base + "/events?conversation=ann,ben", base + "/events?user=ann",
            base + "/conversations/ann,ben/messages", base + "/users/ben/inbox"], before, after))
        if plan == "free":
            before = time.time()
            must("PUT", base + "/attachments/pic", token, b"watched", "image/png")
            watched.append(("attachment", 7, token, [base + "/attachments/pic"], before, time.time()))
    ended = set()
    while len(ended) < len(watched):
        for name, life, token, routes, before, after in watched:
            if name in ended:
                continue
            here = []
            for route in routes:
                asked = time.time()
                status, text = ask("GET", route, token)
                there, answered = status == 200 and b"watched" in text, time.time()
                here.append(there)
                if not there and answered < before + life * day and asked > after + TICK:
                    failed += 1
                    print(f"{name}: {route} has lost it {before + life * day - answered:.2f} s before its end")
                if there and asked > after + life * day + TICK:
                    failed += 1
                    print(f"{name}: {route} still has it {asked - after - life * day:.2f} s after its end")
            if not any(here) and time.time() > after + life * day:
                ended.add(name)
                print(f"{name}: there for {life} days of {day:g} s, and gone from {len(routes)} routes")
        time.sleep(min(0.05, day / 20))
    return failed


def build_token(app, certificate):
    """An AccessToken2 with the app's privilege, as docs/api/guide.md has it."""
    import base64, hashlib, hmac, os, struct, zlib

    def string(b):
        return struct.pack("<H", len(b)) + b

    issued, life, salt = int(time.time()), 3600, struct.unpack("<I", os.urandom(4))[0]
    info = string(app.encode()) + struct.pack("<IIIH", issued, life, salt, 1)
    info += struct.pack("<HHHI", 5, 1, 2, life) + string(b"")
    mac = lambda key, text: hmac.new(key, text, hashlib.sha256).digest()
    key = mac(struct.pack("<I", salt), mac(struct.pack("<I", issued), certificate.encode()))
    return "007" + base64.b64encode(zlib.compress(string(mac(key, info)) + info)).decode()


def seconds(text):
    for unit, factor in (("ms", 0.001), ("s", 1), ("m", 60), ("h", 3600)):
        if text.endswith(unit):
            return float(text[: -len(unit)]) * factor
    sys.exit("a day is a time such as 2s")


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--all"]
    if len(arguments) != 2:
        sys.exit(__doc__)
    table = [("free", 3), ("basic", 7)]
    if "--all" in sys.argv:
        table += [("pro", 90), ("enterprise", 180)]
    failed = main(arguments[0], seconds(arguments[1]), table)
    sys.exit(f"{failed} answers were wrong" if failed else 0)
