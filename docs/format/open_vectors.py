#!/usr/bin/env python3
"""Opens the published test vectors with a stock AES-GCM, HKDF and HMAC.

Written from envelope.md and keyring.md, without Coffer's code. Needs the
package "cryptography". Usage: open_vectors.py [vectors/envelope.json]
Exit status 0 when every vector behaves as published, 1 otherwise.
"""

import hashlib
import hmac
import json
import pathlib
import struct
import sys

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


class Refused(Exception):
    pass


def lp(value):
    """A value after its length in four bytes, big-endian."""
    if isinstance(value, str):
        value = value.encode()
    return struct.pack(">I", len(value)) + value


def u32(n):
    return struct.pack(">I", n)


def hkdf(secret, info):
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


def data_key(v):
    secret = bytes.fromhex(v["epoch_key"]) + bytes.fromhex(v["subject_key"])
    return hkdf(secret, lp("coffer/v1 data") + lp(v["region"]) + lp(v["app"]) + u32(v["epoch"]))


def open_envelope(v, aad, env):
    if len(env) < 84 or env[:4] != b"\xc0\x01\x01\x00":
        raise Refused("envelope")
    header, nonce, body = env[:56], env[56:68], env[68:]
    key = data_key(v)
    if (
        struct.unpack(">I", header[4:8])[0] != v["epoch"]
        or header[8:24] != bytes.fromhex(v["subject"])
        or header[24:56] != hkdf(key, b"coffer/v1 commit")
    ):
        raise Refused("key mismatch")
    try:
        return AESGCM(key).decrypt(nonce, body, header + aad)
    except InvalidTag:
        raise Refused("authentication") from None


def open_wrapped(v):
    blob = bytes.fromhex(v["wrapped"])
    if len(blob) != 65 or blob[0] != 1:
        raise Refused("wrapped key")
    generation = blob[1:5]
    aad = lp("coffer/v1 key") + lp(v["region"]) + lp(v["app"]) + generation + lp(v["kind"]) + lp(bytes.fromhex(v["id"]))
    return AESGCM(bytes.fromhex(v["app_key"])).decrypt(blob[5:17], blob[17:], aad)


def open_blob(v):
    blob = bytes.fromhex(v["blob"])
    if len(blob) < 30 or blob[:2] != b"\xc2\x01":
        raise Refused("blob")
    aad = blob[:2] + lp("coffer/v1 blob") + lp(v["region"]) + lp(v["app"]) + lp(v["purpose"])
    return AESGCM(bytes.fromhex(v["blob_key"])).decrypt(blob[2:14], blob[14:], aad)


def main():
    default = pathlib.Path(__file__).resolve().parent / "vectors" / "envelope.json"
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default
    vectors = json.loads(path.read_text())
    bad = []

    def check(name, good):
        if not good:
            bad.append(name)

    for v in vectors["envelopes"]:
        check(v["name"] + ": data key", data_key(v).hex() == v["data_key"])
        check(v["name"] + ": key id", hkdf(data_key(v), b"coffer/v1 commit").hex() == v["key_id"])
        try:
            got = open_envelope(v, bytes.fromhex(v["aad"]), bytes.fromhex(v["envelope"]))
            check(v["name"] + ": plaintext", got.hex() == v["plaintext"])
        except Refused as e:
            bad.append(f"{v['name']}: refused, {e}")
    for r in vectors["refused"]:
        try:
            open_envelope(vectors["envelopes"][r["key"]], bytes.fromhex(r["aad"]), bytes.fromhex(r["envelope"]))
            bad.append(f"{r['name']}: accepted")
        except Refused as e:
            check(f"{r['name']}: refused as {e}", str(e) == r["error"])
    for v in vectors["tags"]:
        mac = hmac.new(bytes.fromhex(v["tag_key"]), lp("coffer/v1 tag") + lp(v["kind"]) + lp(v["id"]), hashlib.sha256)
        check(f"tag of {v['kind']} {v['id']}", mac.digest()[:16].hex() == v["tag"])
    for v in vectors["macs"]:
        message = lp("coffer/v1 mac") + lp(v["purpose"]) + lp(bytes.fromhex(v["message"]))
        check(f"code for {v['purpose']}", hmac.new(bytes.fromhex(v["tag_key"]), message, hashlib.sha256).hexdigest() == v["mac"])
    for v in vectors["wrapped_keys"]:
        check(v["name"], open_wrapped(v).hex() == v["key"])
    for v in vectors["blobs"]:
        check("blob for " + v["purpose"], open_blob(v).hex() == v["plaintext"])

    if bad:
        print("\n".join(bad), file=sys.stderr)
        return 1
    counts = {k: len(v) for k, v in vectors.items() if isinstance(v, list)}
    if not all(counts.values()):
        print("vectors are missing", file=sys.stderr)
        return 1
    print(
        f"opened {counts['envelopes']} envelopes, refused {counts['refused']}, made {counts['tags']} tags and "
        f"{counts['macs']} codes, unwrapped {counts['wrapped_keys']} keys, opened {counts['blobs']} blobs"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
