"""Walk the hourly history files of a Coffer compatibility listener, as a script
for Agora Chat does, with Python's standard library alone.

COFFER_COMPAT is the base of the app's paths, https://HOST:PORT/ORG/APP;
COFFER_TOKEN is an app token; COFFER_CA, if set, holds the server's authority.
Arguments: how many hours back to begin (48), then how many to walk (all).
"""

import datetime
import gzip
import json
import os
import ssl
import sys
import urllib.error
import urllib.request

base = os.environ["COFFER_COMPAT"].rstrip("/")
tls = ssl.create_default_context(cafile=os.environ.get("COFFER_CA") or None)


def get(url, token=None):
    request = urllib.request.Request(url, headers={"Content-Type": "application/json"})
    if token:
        request.add_header("Authorization", "Bearer " + token)
    with urllib.request.urlopen(request, context=tls, timeout=60) as answer:
        return answer.read()


now = datetime.datetime.now(datetime.timezone.utc)
back = int(sys.argv[1]) if len(sys.argv) > 1 else 48
count = int(sys.argv[2]) if len(sys.argv) > 2 else back
total = 0
for n in range(count):
    hour = now - datetime.timedelta(hours=back - n)
    name = hour.strftime("%Y%m%d%H")
    try:
        answer = json.loads(get(base + "/chatmessages/" + name, os.environ["COFFER_TOKEN"]))
    except urllib.error.HTTPError as refused:
        problem = json.loads(refused.read())
        sys.exit("%s: %s: %s" % (name, problem["error"], problem["error_description"]))
    # The link needs no token.
    for line in gzip.decompress(get(answer["data"][0]["url"])).splitlines():
        message = json.loads(line)
        at = datetime.datetime.fromtimestamp(message["timestamp"] / 1000, datetime.timezone.utc)
        if at.strftime("%Y%m%d%H") != name:
            sys.exit("%s holds a message of %s" % (name, at))
        print(name, message["msg_id"], message["chat_type"], message["from"], message["to"])
        total += 1
print("messages:", total)
