#!/usr/bin/env python3
"""Verifies a region's signed residency manifest.

Written from residency.md, without Coffer's code. Needs the package
"cryptography". Usage: verify_residency.py MANIFEST KEYS [KID]

MANIFEST is the answer of GET /v1/region, KEYS that of GET /v1/region/keys, and
KID the id of the key that is trusted; without it any key of KEYS is.
Exit status 0 when the manifest is signed and keeps the rules, 1 otherwise.
"""

import base64
import datetime
import hashlib
import json
import pathlib
import re
import sys

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


class Refused(Exception):
    pass


def members(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise Refused("a member is there twice")
    return dict(pairs)


def parse(text):
    try:
        return json.loads(text, object_pairs_hook=members)
    except ValueError as e:
        raise Refused("not JSON") from e


def unbase64(text):
    if not re.fullmatch(r"[A-Za-z0-9_-]*", text) or len(text) % 4 == 1:
        raise Refused("not base64url")
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode() != text:
        raise Refused("base64url with loose bits")
    return data


def thumbprint(key):
    canonical = json.dumps({"crv": key["crv"], "kty": key["kty"], "x": key["x"]}, separators=(",", ":"))
    return base64.urlsafe_b64encode(hashlib.sha256(canonical.encode()).digest()).rstrip(b"=").decode()


def verify(signed, keys, trusted):
    parts = signed.split(".")
    if len(parts) != 3:
        raise Refused("not a compact JWS")
    header = parse(unbase64(parts[0]))
    if set(header) != {"alg", "kid", "typ"} or header["alg"] != "EdDSA" or header["typ"] != "coffer-residency":
        raise Refused("the header is of something else")
    if trusted and header["kid"] != trusted:
        raise Refused("signed with a key that is not the trusted one")
    for key in keys["keys"]:
        if key.get("kty") != "OKP" or key.get("crv") != "Ed25519" or thumbprint(key) != header["kid"]:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(unbase64(key["x"])).verify(unbase64(parts[2]), f"{parts[0]}.{parts[1]}".encode())
        except (InvalidSignature, ValueError) as e:
            raise Refused("the signature is wrong") from e
        return parse(unbase64(parts[1]))
    raise Refused("no key has the id that the signature names")


def rules(m, asked):
    """Yields what the manifest breaks."""
    if m["version"] != 1:
        raise Refused("a version that this script does not know")
    region = m["region"]
    if region["id"] != asked:
        yield f"it is of region {region['id']}, not of {asked}"
    if not 1 <= region["number"] <= 255:
        yield "the region has no number"
    if not re.fullmatch("[0-9a-f]{32}", m["log"]):
        yield "the log id is malformed"
    generated = datetime.datetime.fromisoformat(m["generated"].replace("Z", "+00:00"))
    if generated > datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=5):
        yield "it was made in the future"
    names = [s["name"] for s in m["streams"]]
    if names != sorted(set(names)):
        yield "streams are out of order, or there twice"
    kinds = set()
    for s in m["streams"]:
        kinds.update(s["kinds"])
        if not re.fullmatch(rf"(KV_|OBJ_)?coffer_{re.escape(region['id'])}_[a-z0-9_]+", s["name"]):
            yield f"stream {s['name']} is not this region's"
        if not s["kinds"]:
            yield f"stream {s['name']} holds nothing that the retention table knows"
        if s["copies"]:
            yield f"stream {s['name']} is copied: {', '.join(s['copies'])}"
        if s["storage"] != "file":
            yield f"stream {s['name']} is kept in {s['storage']}"
        if s["replicas"] < 1 or (s["servers"] and len(s["servers"]) != s["replicas"]):
            yield f"stream {s['name']} has {len(s['servers'])} servers for {s['replicas']} replicas"
        if not re.fullmatch("[0-9a-f]{32}", s["incarnation"]):
            yield f"stream {s['name']} has no incarnation"
    for kind in sorted({"messages", "attachments", "callbacks", "audit", "registry", "keyring", "profiles"} - kinds):
        yield f"nothing is said to hold {kind}"
    if [k["primary"] for k in m["keys"]].count(True) != 1:
        yield "there is not one primary key"
    for k in m["keys"]:
        if k["provider"] == "awskms" and (k["region"] != region["cloud"] or f":{region['cloud']}:" not in k["key"]):
            yield f"key {k['key']} is not in {region['cloud']}"
    if not any(e["kind"] == "api" for e in m["endpoints"]):
        yield "there is no listener"


def main():
    answer = parse(pathlib.Path(sys.argv[1]).read_text())
    keys = parse(pathlib.Path(sys.argv[2]).read_text())
    try:
        manifest = verify(answer["signed"], keys, sys.argv[3] if len(sys.argv) > 3 else "")
        broken = list(rules(manifest, answer["region"]))
        if manifest != answer["manifest"]:
            broken.append("what is shown is not what is signed")
    except (Refused, KeyError, TypeError, ValueError) as e:
        print(f"refused: {e!r}" if not isinstance(e, Refused) else f"refused: {e}", file=sys.stderr)
        return 1
    if broken:
        print("\n".join("refused: " + b for b in broken), file=sys.stderr)
        return 1
    print(f"verified region {manifest['region']['id']}: {len(manifest['streams'])} streams, {len(manifest['keys'])} keys, "
          f"{len(manifest['endpoints'])} listeners, made {manifest['generated']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
