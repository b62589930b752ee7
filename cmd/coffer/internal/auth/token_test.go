package auth

import (
	"bytes"
	"compress/zlib"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	testApp         = "970ca35de60c44645bbae8a215061b33"
	testCertificate = "5cfd2fd1755d40ecb72977518be15d3b"
)

type vector struct {
	Name        string            `json:"name"`
	AppID       string            `json:"app_id"`
	Certificate string            `json:"app_certificate"`
	User        string            `json:"user_id"`
	Privileges  map[string]uint32 `json:"privileges"`
	Issued      int64             `json:"issue_ts"`
	Expire      uint32            `json:"expire"`
	Salt        uint32            `json:"salt"`
	Token       string            `json:"token"`
	Content     string            `json:"content_hex"`
	Signature   string            `json:"signature_hex"`
	Expected    string            `json:"expected"`
}

func vectors(t testing.TB) []vector {
	t.Helper()
	b, err := os.ReadFile("testdata/agora-token-vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Vectors []vector `json:"vectors"`
	}
	if err := json.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	if len(file.Vectors) < 4 {
		t.Fatalf("%d vectors, want at least 4", len(file.Vectors))
	}
	return file.Vectors
}

// The vectors were made by an independent implementation, npm agora-token.
func TestVectors(t *testing.T) {
	for _, v := range vectors(t) {
		t.Run(v.Name, func(t *testing.T) {
			now := time.Unix(max(v.Issued, 1111111111)+1, 0)
			claims, err := verify(v.Token, now, v.Certificate)
			if v.Expected != "accept" {
				if err == nil {
					t.Fatalf("accepted: %+v", claims)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_, app := v.Privileges["2"]
			if claims.User != v.User || claims.App != app || claims.AppID != v.AppID {
				t.Errorf("claims %+v", claims)
			}
			content, err := buildContent(Spec{
				AppID: v.AppID, Certificate: v.Certificate, User: v.User, Salt: v.Salt,
				Issued: time.Unix(v.Issued, 0), Lifetime: time.Duration(v.Expire) * time.Second,
			})
			if err != nil {
				t.Fatal(err)
			}
			if got := hex.EncodeToString(content); got != v.Content {
				t.Errorf("content\n got %s\nwant %s", got, v.Content)
			}
			if got := hex.EncodeToString(content[2:34]); got != v.Signature {
				t.Errorf("signature %s, want %s", got, v.Signature)
			}
			if claims.Expires.Unix() != v.Issued+int64(v.Expire) {
				t.Errorf("expires %s", claims.Expires)
			}
		})
	}
}

func verify(text string, now time.Time, certificates ...string) (Claims, error) {
	token, err := Parse(text)
	if err != nil {
		return Claims{}, err
	}
	return token.Verify(certificates, now)
}

func pack(content []byte) string {
	var b bytes.Buffer
	w := zlib.NewWriter(&b)
	_, _ = w.Write(content)
	_ = w.Close()
	return "007" + base64.StdEncoding.EncodeToString(b.Bytes())
}

// draft builds tokens that the public builder refuses to make.
type draft struct {
	issued, expire uint32
	services       []byte
}

func (d draft) token() string {
	const salt = 7
	le := binary.LittleEndian
	b := appendString(nil, testApp)
	b = le.AppendUint32(b, d.issued)
	b = le.AppendUint32(b, d.expire)
	b = le.AppendUint32(b, salt)
	b = append(b, d.services...)
	return pack(append(appendString(nil, string(sign(testCertificate, d.issued, salt, b))), b...))
}

func service(kind uint16, fields []string, privileges ...uint32) []byte {
	le := binary.LittleEndian
	b := le.AppendUint16(nil, kind)
	b = le.AppendUint16(b, uint16(len(privileges)/2))
	for i := 0; i < len(privileges); i += 2 {
		b = le.AppendUint16(b, uint16(privileges[i]))
		b = le.AppendUint32(b, privileges[i+1])
	}
	for _, f := range fields {
		b = appendString(b, f)
	}
	return b
}

func services(list ...[]byte) []byte {
	b := binary.LittleEndian.AppendUint16(nil, uint16(len(list)))
	return append(b, bytes.Join(list, nil)...)
}

func TestRefused(t *testing.T) {
	const issued = 1_700_000_000
	now := time.Unix(issued+10, 0)
	good, err := Build(Spec{AppID: testApp, Certificate: testCertificate, User: "alice", Issued: time.Unix(issued, 0), Lifetime: time.Hour, Salt: 1})
	if err != nil {
		t.Fatal(err)
	}
	packed, err := base64.StdEncoding.DecodeString(good[3:])
	if err != nil {
		t.Fatal(err)
	}
	alice := []string{"alice"}
	user := func(d draft) string {
		if d.services == nil {
			d.services = services(service(serviceChat, alice, privilegeUser, 600))
		}
		return d.token()
	}
	for _, c := range []struct {
		name, token string
		want        error
	}{
		{"empty", "", ErrMalformed},
		{"version only", "007", ErrMalformed},
		{"old version", "006" + good[3:], ErrMalformed},
		{"truncated text", good[:len(good)-8], ErrMalformed},
		{"url base64", strings.NewReplacer("+", "-", "/", "_").Replace(good) + "-_", ErrMalformed},
		{"line break", good[:40] + "\n" + good[40:], ErrMalformed},
		{"space", good + " ", ErrMalformed},
		{"over-long text", "007" + strings.Repeat("A", MaxTokenLength), ErrMalformed},
		{"bytes after zlib", "007" + base64.StdEncoding.EncodeToString(append(slices.Clip(packed), 0)), ErrMalformed},
		{"zlib checksum", "007" + base64.StdEncoding.EncodeToString(append(packed[:len(packed)-1:len(packed)-1], packed[len(packed)-1]^1)), ErrMalformed},
		{"zlib bomb", pack(make([]byte, 1<<20)), ErrMalformed},
		{"empty content", pack(nil), ErrMalformed},
		{"short signature", pack(append(appendString(nil, "short"), make([]byte, 40)...)), ErrMalformed},
		{"no services", draft{issued: issued, expire: 600, services: services()}.token(), ErrPrivilege},
		{"missing services", draft{issued: issued, expire: 600, services: []byte{}}.token(), ErrMalformed},
		{"truncated service", draft{issued: issued, expire: 600, services: services(service(serviceChat, nil, privilegeUser, 600))}.token(), ErrMalformed},
		{"count without services", draft{issued: issued, expire: 600, services: []byte{0xff, 0xff}}.token(), ErrMalformed},
		{"trailing bytes", user(draft{issued: issued, expire: 600, services: append(services(service(serviceChat, alice, privilegeUser, 600)), 0)}), ErrMalformed},
		{"chat twice", user(draft{issued: issued, expire: 600, services: services(service(serviceChat, alice, privilegeUser, 600), service(serviceChat, []string{""}, privilegeApp, 600))}), ErrMalformed},
		{"privilege twice", user(draft{issued: issued, expire: 600, services: services(service(serviceChat, alice, privilegeUser, 1, privilegeUser, 600))}), ErrMalformed},
		{"unknown service before", user(draft{issued: issued, expire: 600, services: services(service(4, nil), service(serviceChat, alice, privilegeUser, 600))}), ErrMalformed},
		{"unknown service after", user(draft{issued: issued, expire: 600, services: services(service(serviceChat, alice, privilegeUser, 600), service(9, nil))}), ErrMalformed},
		{"no chat service", user(draft{issued: issued, expire: 600, services: services(service(serviceRTM, alice, 1, 600))}), ErrPrivilege},
		{"no chat privilege", user(draft{issued: issued, expire: 600, services: services(service(serviceChat, alice))}), ErrPrivilege},
		{"user with the app's privilege", user(draft{issued: issued, expire: 600, services: services(service(serviceChat, alice, privilegeApp, 600))}), ErrPrivilege},
		{"nobody with a user's privilege", user(draft{issued: issued, expire: 600, services: services(service(serviceChat, []string{""}, privilegeUser, 600))}), ErrPrivilege},
		{"expired", user(draft{issued: issued - 700, expire: 600}), ErrExpired},
		{"privilege expired", user(draft{issued: issued - 700, expire: 3600}), ErrExpired},
		{"not yet valid", user(draft{issued: issued + 10 + 61, expire: 600}), ErrNotYetValid},
		{"too long a life", user(draft{issued: issued, expire: 86401}), ErrLifetime},
		{"32-bit overflow", user(draft{issued: issued, expire: 1<<32 - 1}), ErrLifetime},
	} {
		t.Run(c.name, func(t *testing.T) {
			claims, err := verify(c.token, now, testCertificate)
			if !errors.Is(err, c.want) {
				t.Fatalf("got %+v, %v; want %v", claims, err, c.want)
			}
			if claims != (Claims{}) {
				t.Errorf("claims %+v with an error", claims)
			}
		})
	}
}

func TestSignatureBeforeAnythingElse(t *testing.T) {
	// Expired, overlong and with an unknown service: of a token one did not
	// sign, only the signature is judged.
	d := draft{issued: 1, expire: 1<<32 - 1, services: services(service(9, nil))}
	_, err := verify(d.token(), time.Unix(1_700_000_000, 0), "0123456789abcdef0123456789abcdef")
	if !errors.Is(err, ErrSignature) {
		t.Fatalf("got %v", err)
	}
	if _, err := verify(d.token(), time.Unix(1_700_000_000, 0)); !errors.Is(err, ErrSignature) {
		t.Fatalf("without certificates: got %v", err)
	}
}

func TestEverySignedByteCounts(t *testing.T) {
	content, err := buildContent(Spec{AppID: testApp, Certificate: testCertificate, User: "alice", Issued: time.Unix(1_700_000_000, 0), Lifetime: time.Hour, Salt: 1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range content {
		flipped := bytes.Clone(content)
		flipped[i] ^= 1
		if claims, err := verify(pack(flipped), time.Unix(1_700_000_001, 0), testCertificate); err == nil {
			t.Fatalf("flipped bit in byte %d accepted: %+v", i, claims)
		}
		if _, err := verify(pack(content[:i]), time.Unix(1_700_000_001, 0), testCertificate); err == nil {
			t.Fatalf("cut at %d accepted", i)
		}
	}
}

func TestTokenEdges(t *testing.T) {
	build := func(issued int64) string {
		token, err := Build(Spec{AppID: testApp, Certificate: testCertificate, Issued: time.Unix(issued, 0), Lifetime: MaxLifetime})
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	const now = 1_700_000_000
	for _, c := range []struct {
		name   string
		issued int64
		want   error
	}{
		{"at its last second", now - 86400, nil},
		{"a second late", now - 86401, ErrExpired},
		{"as far ahead as the skew", now + 60, nil},
		{"a second beyond the skew", now + 61, ErrNotYetValid},
	} {
		if _, err := verify(build(c.issued), time.Unix(now, 0), testCertificate); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
	}
	// The previous certificate keeps working while one rotates.
	if _, err := verify(build(now), time.Unix(now, 0), "ffffffffffffffffffffffffffffffff", testCertificate); err != nil {
		t.Errorf("second certificate: %v", err)
	}
	// Issue time near the end of the format's range: no 32-bit sum.
	if _, err := verify(build(1<<32-1), time.Unix(1<<32+10, 0), testCertificate); err != nil {
		t.Errorf("sum beyond 32 bits: %v", err)
	}
}

func TestOtherServicesAreSkipped(t *testing.T) {
	d := draft{issued: 1_700_000_000, expire: 600, services: services(
		service(serviceRTC, []string{"channel", "1"}, 1, 600),
		service(serviceRTM, []string{"alice"}, 1, 600),
		service(serviceChat, []string{"alice"}, privilegeUser, 600),
	)}
	claims, err := verify(d.token(), time.Unix(1_700_000_001, 0), testCertificate)
	if err != nil || claims.User != "alice" || claims.App {
		t.Fatalf("got %+v, %v", claims, err)
	}
}

func TestBuildRefuses(t *testing.T) {
	ok := Spec{AppID: testApp, Certificate: testCertificate, Issued: time.Unix(1, 0), Lifetime: time.Hour}
	long, early, none, user := ok, ok, ok, ok
	long.Lifetime = MaxLifetime + time.Second
	early.Issued = time.Unix(-1, 0)
	none.Lifetime = 0
	user.User = strings.Repeat("a", 256)
	for _, s := range []Spec{long, early, none, user} {
		if _, err := Build(s); err == nil {
			t.Errorf("built %+v", s)
		}
	}
}

func FuzzToken(f *testing.F) {
	seeds := 0
	for _, v := range vectors(f) {
		f.Add(v.Token)
		seeds++
	}
	if seeds == 0 {
		f.Fatal("no seeds")
	}
	f.Fuzz(func(t *testing.T, text string) {
		token, err := Parse(text)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("error outside the set: %v", err)
			}
			return
		}
		// Whatever parses says exactly what its content says: put together
		// again it is the same content.
		content, err := inflate(text[3:])
		if err != nil {
			t.Fatal(err)
		}
		le := binary.LittleEndian
		again := appendString(nil, string(token.signature))
		again = appendString(again, token.AppID)
		again = le.AppendUint32(again, token.issued)
		again = le.AppendUint32(again, token.expire)
		again = le.AppendUint32(again, token.salt)
		again = append(again, token.services...)
		if !bytes.Equal(content, again) {
			t.Fatalf("content %x, again %x", content, again)
		}
		now := time.Unix(int64(token.issued), 0)
		if _, err := token.Verify([]string{"not the certificate"}, now); !errors.Is(err, ErrSignature) {
			t.Fatalf("verified with a wrong certificate: %v", err)
		}
		_, _ = parseServices(token.services)
	})
}

func BenchmarkVerify(b *testing.B) {
	text := vectors(b)[1].Token
	b.ReportAllocs()
	for b.Loop() {
		if _, err := verify(text, time.Unix(1_700_000_001, 0), testCertificate); err != nil {
			b.Fatal(err)
		}
	}
}
