package webhook

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Pinned: the official libraries of Standard Webhooks (MIT), which know HMAC only,
// and the usual ones for JOSE, panva's (MIT) and Authlib's (BSD). Ed25519 is
// verified by Node.js itself, and by the Python library cryptography, which joserfc
// brings along.
func javaScriptLibraries() []string { return []string{"standardwebhooks@1.1.1", "jose@6.2.3"} }

func pythonLibraries() []string { return []string{"standardwebhooks==1.1.0", "joserfc==1.7.5"} }

const javaScript = `
const crypto = require("crypto");
const { Webhook } = require("standardwebhooks");
const { compactDecrypt, importJWK } = require("jose");
const answer = async (m) => {
	const hmac = (text) => { try { new Webhook(m.secret).verify(text, m.headers); return true } catch { return false } };
	const key = crypto.createPublicKey({ format: "jwk", key: { kty: "OKP", crv: "Ed25519", x: Buffer.from(m.public, "base64").toString("base64url") } });
	const ed25519 = (text) => m.headers["webhook-signature"].split(" ").some((s) => {
		const [version, signature] = s.split(",");
		const signed = Buffer.from(m.headers["webhook-id"] + "." + m.headers["webhook-timestamp"] + "." + text);
		return version === "v1a" && crypto.verify(null, signed, key, Buffer.from(signature, "base64"));
	});
	const opened = [];
	for (const s of m.sealed) {
		const { plaintext, protectedHeader } = await compactDecrypt(s.text, await importJWK(s.key, s.algorithm), {
			keyManagementAlgorithms: [s.algorithm], contentEncryptionAlgorithms: ["A256GCM"],
		});
		opened.push(protectedHeader.alg + " " + new TextDecoder().decode(plaintext));
	}
	return { hmac: [m.body, m.body + " "].map(hmac), ed25519: [m.body, m.body + " "].map(ed25519), opened };
};
Promise.all(JSON.parse(require("fs").readFileSync(0, "utf8")).map(answer)).then((all) => console.log(JSON.stringify(all)));`

const python = `
import base64, json, sys
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from joserfc import jwe, jwk
from standardwebhooks.webhooks import Webhook
def answer(m):
    def hmac(text):
        try:
            Webhook(m["secret"]).verify(text, m["headers"])
            return True
        except Exception:
            return False
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(m["public"]))
    def ed25519(text):
        h = m["headers"]
        for s in h["webhook-signature"].split(" "):
            version, signature = s.split(",")
            if version == "v1a":
                try:
                    key.verify(base64.b64decode(signature), (h["webhook-id"] + "." + h["webhook-timestamp"] + "." + text).encode())
                    return True
                except InvalidSignature:
                    pass
        return False
    opened = []
    for s in m["sealed"]:
        found = jwe.decrypt_compact(s["text"], jwk.import_key(s["key"]), algorithms=[s["algorithm"], "A256GCM"])
        opened.append(found.headers()["alg"] + " " + found.plaintext.decode())
    texts = [m["body"], m["body"] + " "]
    return {"hmac": [hmac(t) for t in texts], "ed25519": [ed25519(t) for t in texts], "opened": opened}
print(json.dumps([answer(m) for m in json.load(sys.stdin)]))`

// A question is what a program of another language is given.
type question struct {
	Secret  string            `json:"secret"` // of HMAC
	Public  string            `json:"public"` // of Ed25519
	Body    string            `json:"body"`
	Headers map[string]string `json:"headers"`
	Sealed  []sealedText      `json:"sealed"`
}

type sealedText struct {
	Algorithm string          `json:"algorithm"`
	Key       json.RawMessage `json:"key"` // private
	Text      string          `json:"text"`
}

// A reply is what it found: signatures of the body and of another, and what is in
// sealed texts, behind their algorithms.
type reply struct {
	HMAC    []bool   `json:"hmac"`
	Ed25519 []bool   `json:"ed25519"`
	Opened  []string `json:"opened"`
}

func missing(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// run runs a program and returns what it printed; its failure ends the test.
func run(t *testing.T, dir, in string, program string, args ...string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(in)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v: %s", program, err, stderr.String())
	}
	return out.Bytes()
}

// library installs what a language needs, unless it is there.
func library(t *testing.T, cache, language string, wanted []string, install func()) {
	t.Helper()
	mark := filepath.Join(cache, language+".complete")
	if there, err := os.ReadFile(mark); err == nil && string(there) == strings.Join(wanted, " ") {
		return
	}
	if os.Getenv("COFFER_TEST_REQUIRE") != "all" {
		missing(t, "skipped: needs "+strings.Join(wanted, " and ")+" for "+language+"; COFFER_TEST_REQUIRE=all installs them")
	}
	install()
	if err := os.WriteFile(mark, []byte(strings.Join(wanted, " ")), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestOtherLanguages: libraries of other languages accept what is signed here, while
// a secret of either kind is replaced by one of the other too, refuse another body,
// and open what is sealed here.
func TestOtherLanguages(t *testing.T) {
	cache, err := filepath.Abs("../../../../.cache/standardwebhooks")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	sealed, contents := sealedTexts(t)
	older, newer, other := must(NewSecret(Symmetric))(t), must(NewSecret(Symmetric))(t), must(NewSecret(Symmetric))(t)
	pair, otherPair := must(NewSecret(Asymmetric))(t), must(NewSecret(Asymmetric))(t)
	cases := []struct {
		what              string
		signing           []*Secret
		secret, pair      *Secret
		byHMAC, byEd25519 bool
	}{
		{"the older secret", []*Secret{newer, older}, older, pair, true, false},
		{"the newer secret", []*Secret{newer, older}, newer, pair, true, false},
		{"another secret", []*Secret{newer, older}, other, pair, false, false},
		{"Ed25519", []*Secret{pair}, other, pair, false, true},
		{"another public key", []*Secret{pair}, other, otherPair, false, false},
		{"HMAC replaced by Ed25519", []*Secret{pair, older}, older, pair, true, true},
		{"Ed25519 replaced by HMAC", []*Secret{newer, pair}, newer, pair, true, true},
	}
	var questions []question
	for _, tt := range cases {
		q := question{Secret: tt.secret.Verifier(), Body: `{"text":"naïve ☕"}`, Headers: make(map[string]string), Sealed: sealed}
		q.Public = strings.TrimPrefix(tt.pair.Verifier(), publicPrefix)
		header := make(http.Header)
		if err := Sign(header, "msg_1", time.Now(), []byte(q.Body), tt.signing...); err != nil {
			t.Fatal(err)
		}
		for name := range header {
			q.Headers[strings.ToLower(name)] = header.Get(name)
		}
		questions = append(questions, q)
	}
	check := func(t *testing.T, program string, args ...string) {
		t.Helper()
		in, err := json.Marshal(questions)
		if err != nil {
			t.Fatal(err)
		}
		var replies []reply
		if out := run(t, cache, string(in), program, args...); json.Unmarshal(out, &replies) != nil || len(replies) != len(cases) {
			t.Fatalf("%s: %s", program, out)
		}
		for i, tt := range cases {
			got := replies[i]
			if !slices.Equal(got.HMAC, []bool{tt.byHMAC, false}) || !slices.Equal(got.Ed25519, []bool{tt.byEd25519, false}) {
				t.Errorf("%s: HMAC %v, want %v; Ed25519 %v, want %v; never with another body", tt.what, got.HMAC, tt.byHMAC, got.Ed25519, tt.byEd25519)
			}
			if !slices.Equal(got.Opened, contents) {
				t.Errorf("opened: %q, want %q", got.Opened, contents)
			}
		}
	}
	t.Run("JavaScript", func(t *testing.T) {
		for _, program := range []string{"node", "npm"} {
			if _, err := exec.LookPath(program); err != nil {
				missing(t, "skipped: needs "+program+"; install Node.js")
			}
		}
		library(t, cache, "JavaScript", javaScriptLibraries(), func() {
			run(t, cache, "", "npm", append([]string{"install", "--no-save", "--no-audit", "--no-fund", "--prefix", cache}, javaScriptLibraries()...)...)
		})
		check(t, "node", "-e", javaScript)
	})
	t.Run("Python", func(t *testing.T) {
		if _, err := exec.LookPath("python3"); err != nil {
			missing(t, "skipped: needs python3; install Python")
		}
		interpreter := filepath.Join(cache, "venv/bin/python")
		library(t, cache, "Python", pythonLibraries(), func() {
			run(t, cache, "", "python3", "-m", "venv", "venv")
			run(t, cache, "", interpreter, append([]string{"-m", "pip", "install", "--quiet", "--disable-pip-version-check"}, pythonLibraries()...)...)
		})
		check(t, interpreter, "-c", python)
	})
}

// sealedTexts seals for a key of each kind that an endpoint may have.
func sealedTexts(t *testing.T) (texts []sealedText, contents []string) {
	t.Helper()
	withRSA, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	add := func(key, public any, algorithm string) {
		r, err := ParseRecipient(jwk(t, public, algorithm))
		if err != nil {
			t.Fatal(err)
		}
		body := `[{"key":` + strconv.Itoa(len(texts)) + `,"text":"naïve ☕"}]`
		text, err := r.Seal([]byte(body), "application/cloudevents+json")
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, sealedText{algorithm, jwk(t, key, algorithm), text})
		contents = append(contents, algorithm+" "+body)
	}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		add(key, key.Public(), "ECDH-ES")
	}
	add(withRSA, withRSA.Public(), "RSA-OAEP-256")
	add(withRSA, withRSA.Public(), "RSA-OAEP")
	return texts, contents
}
