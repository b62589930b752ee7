"""Appends an event, replays everything, reads one event of the live tail."""

import json
import os
import ssl
import time
import urllib.request

EVENTS = f"{os.environ['COFFER_URL']}/v1/apps/{os.environ['COFFER_APP']}/events"
TLS = ssl.create_default_context(cafile=os.environ["COFFER_CA"])


def call(url, accept="application/json", body=None, **headers):
    headers |= {"Authorization": f"Bearer {os.environ['COFFER_TOKEN']}", "Accept": accept}
    if body is not None:
        headers["Content-Type"] = "application/json"
        body = json.dumps(body).encode()
    return urllib.request.urlopen(
        urllib.request.Request(url, data=body, headers=headers), context=TLS, timeout=60
    )


def replay(query=""):
    """Yields every event; fails when the stream was cut."""
    with call(EVENTS + query, accept="application/x-ndjson") as answer:
        for line in answer:
            event = json.loads(line)
            if "end" in event:
                return
            yield event
    raise EOFError("cut: go on after the position of the last event")


def tail(last_id):
    """Yields (id, event) for ever; a cut is taken up after the last id."""
    while True:
        try:
            with call(EVENTS, "text/event-stream", **{"Last-Event-ID": last_id}) as answer:
                name = data = ""
                for line in answer:
                    field, _, value = line.decode().rstrip("\n").partition(": ")
                    if field == "id":
                        last_id = value
                    elif field == "event":
                        name = value
                    elif field == "data":
                        data = value
                    elif field == "":
                        if data and not name:
                            yield last_id, json.loads(data)
                        name = data = ""
        except OSError:
            pass
        time.sleep(1)


event_id = f"python-{time.time_ns()}"
with call(EVENTS, body={
    "id": event_id, "type": "message.sent", "sender": "ann", "recipient": "ben",
    "data": {"bodies": [{"type": "txt", "msg": "Hello from Python"}]},
}) as answer:
    position = json.load(answer)["position"]
print("stored", event_id, "at", position)
print("replayed", sum(1 for _ in replay(f"?min_position={position}")), "events")
for cursor, event in tail(str(int(position) - 1)):
    print("tail:", event["id"], "next", cursor)
    break
