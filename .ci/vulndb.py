#!/usr/bin/env python3
"""Lay out the Go vulnerability database for govulncheck's file:// source.

usage: vulndb.py VULNDB_MODULE_DIR OUT_DIR

The database's source is itself a Go module (golang.org/x/vulndb); its
data/osv folder holds one OSV document per vulnerability. govulncheck wants an
index beside them (https://go.dev/doc/security/vuln/database#api). "fixed" is
left out of the index on purpose: then every entry of a module in use is read
and judged by its own ranges.
"""
import json
import pathlib
import shutil
import sys

# The dates of the entries are not kept in the module, and govulncheck only
# prints them.
UNDATED = "0001-01-01T00:00:00Z"


def main() -> None:
    source, out = pathlib.Path(sys.argv[1], "data", "osv"), pathlib.Path(sys.argv[2])
    shutil.rmtree(out, ignore_errors=True)
    (out / "ID").mkdir(parents=True)
    (out / "index").mkdir()
    modules: dict[str, list[dict[str, str]]] = {}
    vulns = []
    for path in sorted(source.glob("GO-*.json")):
        entry = json.loads(path.read_bytes())
        shutil.copyfile(path, out / "ID" / path.name)
        vulns.append({"id": entry["id"], "modified": UNDATED, "aliases": entry.get("aliases", [])})
        for name in {a["package"]["name"] for a in entry["affected"]}:
            modules.setdefault(name, []).append({"id": entry["id"], "modified": UNDATED})
    if not vulns:
        sys.exit(f"vulndb: no entries under {source}")
    index = {
        "db.json": {"modified": UNDATED},
        "vulns.json": vulns,
        "modules.json": [{"path": p, "vulns": v} for p, v in sorted(modules.items())],
    }
    for name, value in index.items():
        (out / "index" / name).write_text(json.dumps(value))
    print(f"{len(vulns)} vulnerabilities of {len(modules)} modules")


if __name__ == "__main__":
    main()
