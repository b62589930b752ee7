#!/usr/bin/env python3
"""Watches every kind of data arrive, stay and go, on a server whose days are short.

    coffer serve --dev --data /tmp/fast --day 2s --port-base 0 --callbacks-allow 127.0.0.0/8 &
    python3 docs/operations/watch_retention.py /tmp/fast/dev.json 2s

It stores something of each row of the retention table and reads it by every route
until it has gone: from the answers, from the streams, and the key with it. It fails
when something goes before its end, or is read after it. By itself it watches what
goes within 7 of the server's days; --days 180 goes on for all plans, accounts and
profiles, --days 400 for the audit log. Exit codes: 0 all went as the table says,
1 something did not, 3 the machine was too slow to see it: take longer days.
Standard library only; needs a folder that nobody else uses.
"""

import json
import sys
import time

from watching import App, Receiver, Server, build_token, seconds

# What reading refuses is refused by the server's clock, so the moment of the answer is
# enough; times are stored to the millisecond. Streams and keys are cleaned by a tick.
READ, SWEPT, PRECISION = 0.0, 20.0, 0.002
TEXT = b"watched"


class Row:
    """Something that was stored between two moments, and the ways to it."""

    def __init__(self, kind, life, since, routes, stored=None, slow=(), final=()):
        self.kind, self.life, self.slow, self.final = kind, life, slow, final
        self.earliest, self.latest = since  # when it arrived, at the earliest and latest
        self.routes = {name: (there, READ) for name, there in routes.items()}
        self.stored = {name: (there, SWEPT) for name, there in (stored or {}).items()}
        self.seen, self.gone, self.wrong, self.asked = {}, {}, [], {}

    def watch(self, day):
        """Asks each way that has to be asked now. Returns whether all have ended."""
        now = time.time()
        begin, end = self.earliest + self.life * day - PRECISION, self.latest + self.life * day
        busy = now < self.latest + day / 2 or now > begin - day
        for name, (there, tick) in (self.routes | self.stored).items():
            pause = (0.3 if name in self.slow else 0) if busy else 2 * day
            if name in self.gone or now - self.asked.get(name, 0) < pause:
                continue
            asked = self.asked[name] = time.time()
            found, answered = there(), time.time()
            if found:
                self.seen[name] = asked
                if asked > end + tick:
                    self.wrong.append(f"{name} still has it {asked - end:.2f} s after its end")
                    self.gone[name] = answered
            elif answered < begin and name in self.seen:
                self.wrong.append(f"{name} has lost it {begin - answered:.2f} s before its end")
                self.gone[name] = answered
            elif answered >= begin:
                self.gone[name] = answered
        if len(self.gone) < len(self.routes) + len(self.stored):
            return False
        self.wrong += [problem for check in self.final if (problem := check())]
        return True

    def line(self, day):
        since = lambda moments: f"{(max(moments) - self.latest) / day:.2f}" if moments else "-"
        read = [n for n in self.routes] or [n for n in self.stored]
        left = [self.gone[n] for n in self.stored]
        return [
            self.kind, f"{self.life:.2f}".replace(".00", ""), since([self.seen[n] for n in read if n in self.seen]),
            since([self.gone[n] for n in self.routes]), since(left), str(len(self.routes) + len(self.stored)),
        ]


def main(path, day, days):
    server = Server(path)
    receiver = Receiver(server.folder)
    ask, must, operator = server.ask, server.must, server.operator
    rows = []

    def has(method, path, token, **headers):
        def there():
            status, text = ask(method, path, token, **headers)
            return status // 100 == 2 and TEXT in text
        return there

    def in_stream(stream):
        def there():
            answer = must("GET", "/v1/admin/streams", operator)
            return any(s["stream"] == stream and s["messages"] > 0 for s in answer["stored"])
        return there

    def epochs(app):
        text = server.content("GET", "/v1/admin/keys/inventory?app=" + app, operator)
        return json.loads(text.splitlines()[0]).get("epochs", [])

    def key(app, epoch):
        return lambda: any(e["id"] == epoch["id"] and "destroyed" not in e for e in epochs(app))

    def keys(app, names):
        """A row for each kind of epoch that an app has now: its key goes at the end of
        the newest."""
        newest = {}
        for epoch in epochs(app):
            newest[epoch["class"].split("/")[0]] = epoch
        for name, epoch in newest.items():
            if name in names:
                now = time.time()
                expires = moment(epoch["expires"])
                rows.append(Row(f"key of {names[name]}", (expires - now) / day, (now, now), {}, {"keyring": key(app, epoch)}))

    def export_of(base, token):
        """Makes an export. Returns its path, its files and when it was made."""
        before = time.time()
        path = base + "/exports/" + must("POST", base + "/exports", token, {"format": "ndjson"})["id"]
        since = before, time.time()
        while must("GET", path, token)["state"] == "running":
            time.sleep(0.01)
        return path, [path + "/files/" + f["name"] for f in must("GET", path + "/manifest", token)["files"]], since

    def watch_message(plan, life, app):
        before = time.time()
        position = must("POST", app.base + "/events", app.token, {
            "id": "m1", "type": "message.sent", "sender": "ann", "recipient": "ben",
            "data": {"bodies": [{"type": "txt", "msg": TEXT.decode()}]}})["position"]
        since = before, time.time()
        must("GET", app.base + "/users/ben/inbox?min_position=" + position, app.token)
        ben = build_token(app.id, app.certificate, "ben")
        read = lambda path, token=app.token, **headers: has("GET", app.base + path, token, **headers)
        _, files, _ = export_of(app.base, app.token)
        routes = {
            "page": read("/events"),
            "newest first": read("/events?order=desc"),
            "lines": read("/events", Accept="application/x-ndjson"),
            "of the conversation": read("/events?conversation=ann,ben"),
            "of the user": read("/events?user=ann"),
            "of the conversation by ben": read("/events?conversation=ann,ben", ben),
            "one event": read("/events/m1"),
            "messages": read("/conversations/ann,ben/messages"),
            "messages by ben": read("/conversations/ann,ben/messages", ben),
            "conversations by ben": read("/conversations", ben),
            "inbox": read("/users/ben/inbox"),
            "SSE": read("/events?follow=false", Accept="text/event-stream"),
            "WebSocket": lambda: TEXT in server.websocket(app.base + "/events?follow=false", app.token)[1],
            "polled callbacks": read("/callbacks?endpoint=" + app.endpoint),
        }
        if life < 7:  # an export itself goes then
            routes["export"] = has("GET", files[0], app.token)

        def sent_again():
            """A webhook replay brings nothing when its time is over."""
            count = receiver.count(app.id.encode(), TEXT)
            replay = must("POST", f"{app.base}/endpoints/{app.endpoint}/replays", app.token, {"from": text_of(before - 60)})["id"]
            for _ in range(500):
                if must("GET", f"{app.base}/replays/{replay}", app.token)["state"] != "running":
                    break
                time.sleep(0.01)
            if receiver.count(app.id.encode(), TEXT) > count:
                return "a webhook replay brought it after its end"

        if life <= days:
            rows.append(Row(f"messages, plan {plan}", life, since, routes, {"stream": in_stream(f"coffer_eu_msg_{plan}_0")},
                            ("export", "WebSocket"),
                            # A replay is noted among the callbacks, which are watched until they have gone.
                            (sent_again,) if life > 3 else ()))
        return since

    def watch_audit():
        record = server.content("GET", "/v1/admin/audit", operator).splitlines()[0]
        stored = moment(json.loads(record)["time"])
        rows.append(Row("audit log", 400, (stored, stored + 1), {}, {
            "log": lambda: record in ask("GET", "/v1/admin/audit?from=1", operator)[1]}))

    def watch_account():
        before = time.time()
        must("POST", "/v1/admin/accounts", operator, {"id": "unused", "name": TEXT.decode()})
        rows.append(Row("account, unused", 180, (before, time.time()), {
            "account": has("GET", "/v1/admin/accounts/unused", operator), "accounts": has("GET", "/v1/admin/accounts", operator)}))
        keys("accounts", {"registration": "accounts"})

    def watch_profile(app):
        before, path = time.time(), app.base + "/users/ben/profile"
        must("PUT", path, app.token, {"nickname": TEXT.decode()})
        there = has("GET", path, app.token)
        # To ask for it is to use it, so it is asked for once, when it has gone.
        rows.append(Row("profile, unused", 180, (before, time.time()), {}, {"bucket": in_stream("KV_coffer_eu_profiles")},
                        final=(lambda: "it can still be asked for" if there() else None,)))

    def watch_export(app):
        path, files, since = export_of(app.base, app.token)
        answers = lambda method, path: lambda: ask(method, path, app.token)[0] == 200
        listed = lambda: path.split("/")[-1].encode() in ask("GET", app.base + "/exports", app.token)[1]
        rows.append(Row("export", 7, since, {
            "exports": listed, "export": answers("GET", path), "manifest": answers("GET", path + "/manifest"),
            "file": has("GET", files[0], app.token), "file by HEAD": answers("HEAD", files[0])}))

    def watch_attachment(app):
        before, path = time.time(), app.base + "/attachments/pic"
        server.content("PUT", path, app.token, TEXT, Content_Type="image/png")
        rows.append(Row("attachment", 7, (before, time.time()), {
            "whole": has("GET", path, app.token), "range": has("GET", path, app.token, Range="bytes=0-"),
            "HEAD": lambda: ask("HEAD", path, app.token)[0] == 200}, {"stream": in_stream("OBJ_coffer_eu_attachments")}))

    def watch_monitoring(app):
        path, counted = app.base + "/metrics?limit=", []
        while not counted:
            counted = must("GET", path + "1", app.token)["data"]
        first = counted[0]["from"]
        shows = lambda query: lambda: f'"from":"{first}"'.encode() in ask("GET", path + query, app.token)[1]
        rows.append(Row("monitoring data", 7, (moment(counted[0]["until"]), time.time()), {
            "metrics": shows("1440"), "metrics from": shows("1&from=" + first)}))

    def watch_callbacks(app, since):
        path = f"{app.base}/endpoints/{app.endpoint}/deliveries"
        shows = lambda query: lambda: b'"position"' in ask("GET", path + query, app.token)[1]
        for _ in range(1000):
            if receiver.count(app.id.encode(), TEXT) and shows("?status=delivered")():
                break
            time.sleep(0.01)
        else:
            sys.exit("the webhook did not come: was the server started with --callbacks-allow 127.0.0.0/8?")
        stored = lambda: any(s["kind"] == "callbacks" and s["messages"] for s in must("GET", "/v1/admin/streams", operator)["stored"])
        rows.append(Row("callbacks", 3, since, {"deliveries": shows(""), "deliveries by status": shows("?status=delivered")}, {"stream": stored}))

    # What is kept longest is made first, so that nothing is over before it is watched.
    if days >= 400:
        watch_audit()
    if days >= 180:
        watch_account()
        app = App(server, receiver, "enterprise")
        watch_message("enterprise", 180, app)
        keys(app.id, {"enterprise": "messages, plan enterprise"})
        # The app is told of the profile's end, so its messages are not watched.
        app = App(server, receiver, "free")
        watch_profile(app)
        keys(app.id, {"profiles": "profiles"})
    app = App(server, receiver, "pro")
    watch_message("pro", 90, app)
    if days >= 90:
        keys(app.id, {"pro": "messages, plan pro"})
    if days >= 7:
        watch_export(app)
        app = App(server, receiver, "basic")
        watch_message("basic", 7, app)
        watch_attachment(app)
        watch_monitoring(app)
        keys(app.id, {"basic": "messages, plan basic", "attachments": "attachments"})
    app = App(server, receiver, "free")
    watch_callbacks(app, watch_message("free", 3, app))
    keys(app.id, {"free": "messages, plan free", "callbacks": "callbacks"})

    print(f"a day lasts {day:g} s; {len(rows)} kinds of data are watched for {days} days", flush=True)
    ended, used = set(), 0.0
    while len(ended) < len(rows):
        if time.time() >= used + day:
            # The account of the server's first app is used, or that app, which has the plan
            # enterprise too, would have an event of its end among the messages.
            used = time.time()
            must("GET", f"/v1/apps/{server.app}/events?limit=1", server.token)
        for row in rows:
            if row not in ended and row.watch(day):
                ended.add(row)
                print(f"{time.strftime('%H:%M:%S')} gone: {row.kind}", flush=True)
        time.sleep(min(0.02, day / 50))
    table([["kind", "life", "seen until", "not read at", "not stored at", "ways"]] + [row.line(day) for row in rows])
    for kind in sorted({row.kind.split(",")[0] for row in rows}):
        ways = {name: None for row in rows if row.kind.split(",")[0] == kind for name in row.routes | row.stored}
        print(f"  {kind}: {', '.join(ways)}")
    print()
    slow = [f"{row.kind}: {name} was not seen in time" for row in rows for name in row.routes | row.stored if name not in row.seen]
    wrong = [f"{row.kind}: {problem}" for row in rows for problem in row.wrong]
    wrong += [f"view {kind}: what should be gone is there for {lag:.0f} s" for kind, lag in overdue(server).items() if lag > SWEPT]
    print("\n".join(wrong + slow + ([] if wrong or slow else ["all of it went when the table says"])))
    return 1 if wrong else 3 if slow else 0


def overdue(server):
    """For how long the views have had what should be gone, from the metrics."""
    lags = {}
    for line in server.content("GET", "/metrics", server.operator).decode().splitlines():
        if line.startswith("coffer_expiry_lag_seconds{") and 'kind="view_' in line:
            lags[line.split('kind="')[1].split('"')[0]] = float(line.split()[-1])
    return lags or sys.exit("the metrics have no lag of the views")


def table(lines):
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    print()
    for line in lines:
        print("  ".join([text.ljust(width) for text, width in zip(line, widths)] + [line[-1]]))
    print("\nTimes are in the server's days since it was stored. The ways to it:")


def moment(text):
    """Seconds since 1970 of an RFC 3339 time."""
    from datetime import datetime

    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def text_of(seconds):
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    days = 7
    if "--days" in arguments[:-1]:
        at = arguments.index("--days")
        days = int(arguments[at + 1])
        del arguments[at:at + 2]
    if len(arguments) != 2 or arguments[0].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(arguments[0], seconds(arguments[1]), days))
