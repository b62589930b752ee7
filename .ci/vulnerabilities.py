#!/usr/bin/env python3
"""Judge what govulncheck found: `govulncheck -format json … | vulnerabilities.py`.

Exit code 1 if code of ours calls a vulnerable function of a module: then raise the
module. What a newer Go would mend is printed and does not fail the run: the
toolchain is the machine's, and release builds use the one of the Dockerfile.
"""
import json
import sys


def objects(text: str):
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        yield value
        while at < len(text) and text[at].isspace():
            at += 1


def main() -> None:
    summaries, called, scanned = {}, {}, False
    for o in objects(sys.stdin.read().strip()):
        scanned = scanned or "SBOM" in o
        if "osv" in o:
            summaries[o["osv"]["id"]] = o["osv"].get("summary", "")
        finding = o.get("finding")
        # A trace that ends in a function is one that our code can reach; the
        # others say that a module is required or a package imported.
        if finding and finding["trace"][0].get("function"):
            where = finding["trace"][0]
            called[finding["osv"]] = (where["module"], where.get("version", ""), finding.get("fixed_version", "no fix"))
    if not scanned:
        sys.exit("vulnerabilities: govulncheck did not scan anything")
    failed = False
    for osv, (module, version, fixed) in sorted(called.items()):
        ours = module != "stdlib"
        failed = failed or ours
        print(f"{'FAIL' if ours else 'note'}  {osv}  {module} {version}, mended in {fixed}: {summaries.get(osv, '')}")
    print(f"{len(called)} vulnerabilities reached, {sum(m != 'stdlib' for m, _, _ in called.values())} of them in modules")
    sys.exit(failed)


if __name__ == "__main__":
    main()
