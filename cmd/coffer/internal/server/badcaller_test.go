package server_test

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// draft is a token made by hand, as auth.Build would not make it.
type draft struct {
	app, certificate string
	issued           time.Time
	seconds          uint32
	services         []byte // after their number
	count            uint16
	after            []byte // after the services, signed too
}

// chat is the chat service with one privilege.
func chat(user string, privilege uint16) []byte {
	le := binary.LittleEndian
	b := le.AppendUint16(nil, 5)
	b = le.AppendUint16(b, 1)
	b = le.AppendUint16(b, privilege)
	b = le.AppendUint32(b, 3600)
	b = le.AppendUint16(b, uint16(len(user))) //nolint:gosec // short
	return append(b, user...)
}

func (d draft) token(t *testing.T) string {
	t.Helper()
	le := binary.LittleEndian
	issued := uint32(d.issued.Unix()) //nolint:gosec // of this century
	b := le.AppendUint16(nil, uint16(len(d.app)))
	b = append(b, d.app...)
	for _, v := range []uint32{issued, d.seconds, 1} {
		b = le.AppendUint32(b, v)
	}
	b = append(le.AppendUint16(b, d.count), d.services...)
	b = append(b, d.after...)
	mac := func(key, message []byte) []byte {
		padded := make([]byte, max(len(key), sha256.BlockSize)) // HMAC pads too; FIPS mode refuses short keys
		copy(padded, key)
		h := hmac.New(sha256.New, padded)
		h.Write(message)
		return h.Sum(nil)
	}
	signature := mac(mac(le.AppendUint32(nil, 1), mac(le.AppendUint32(nil, issued), []byte(d.certificate))), b)
	return packToken(t, slices.Concat(le.AppendUint16(nil, sha256.Size), signature, b))
}

func packToken(t *testing.T, content []byte) string {
	t.Helper()
	var packed bytes.Buffer
	w := zlib.NewWriter(&packed)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return "007" + base64.StdEncoding.EncodeToString(packed.Bytes())
}

// TestBadCredentials sends what would be stored with a good credential, with bad
// ones: each is refused with a problem of its own, and nothing is stored.
func TestBadCredentials(t *testing.T) {
	s := newSite(t, config.Limits{})
	spec := auth.Spec{AppID: s.app, Certificate: s.certificate, Issued: s.now(), Lifetime: time.Hour, Salt: 1}
	build := func(change func(*auth.Spec)) string {
		spec := spec
		change(&spec)
		token, err := auth.Build(spec)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	hand := func(change func(*draft)) string {
		d := draft{app: s.app, certificate: s.certificate, issued: s.now(), seconds: 3600, count: 1, services: chat("", 2)}
		change(&d)
		return d.token(t)
	}
	good := build(func(*auth.Spec) {})
	packed, err := base64.StdEncoding.DecodeString(good[3:])
	if err != nil {
		t.Fatal(err)
	}
	again := func(b []byte) string { return "007" + base64.StdEncoding.EncodeToString(b) }
	flipped := slices.Clone(packed)
	flipped[len(flipped)/2] ^= 1
	header := func(pairs ...string) func(*http.Request) {
		return func(r *http.Request) {
			r.Header.Del("Authorization")
			for i := 0; i < len(pairs); i += 2 {
				r.Header.Add(pairs[i], pairs[i+1])
			}
		}
	}
	for i, c := range []struct {
		name, token string
		change      func(*http.Request)
		status      int
		code, says  string
	}{
		{name: "none", change: header(), status: 401, code: "token-invalid", says: "a token is needed"},
		{name: "two headers", change: header("Authorization", "Bearer "+good, "Authorization", "Bearer "+good), status: 401, code: "token-invalid", says: "one header"},
		{name: "basic", change: header("Authorization", "Basic "+good), status: 401, code: "token-invalid", says: "one header"},
		{name: "without scheme", change: header("Authorization", good), status: 401, code: "token-invalid", says: "one header"},
		{name: "in the query", change: func(r *http.Request) { header()(r); r.URL.RawQuery = "token=" + good }, status: 400, code: "invalid-request", says: "unknown parameter"},
		{name: "cut", token: good[:len(good)-8], status: 401, code: "token-invalid", says: "AccessToken2"},
		{name: "cut in the middle", token: good[:len(good)/8*4+3], status: 401, code: "token-invalid", says: "AccessToken2"},
		{name: "old version", token: "006" + good[3:], status: 401, code: "token-invalid", says: "AccessToken2"},
		{name: "bytes after the base64", token: good + "AAAA", status: 401, code: "token-invalid", says: "AccessToken2"},
		{name: "bytes after the zlib stream", token: again(append(slices.Clone(packed), 0)), status: 401, code: "token-invalid", says: "AccessToken2"},
		{name: "a flipped bit", token: again(flipped), status: 401, code: "token-invalid"},
		{name: "zlib bomb", token: packToken(t, make([]byte, 8<<20)), status: 401, code: "token-invalid", says: "AccessToken2"},
		{name: "over-long", token: "007" + strings.Repeat("A", 16<<10), status: 401, code: "token-invalid", says: "AccessToken2"},
		{name: "expired", token: build(func(a *auth.Spec) { a.Issued = a.Issued.Add(-2 * time.Hour) }), status: 401, code: "token-expired", says: "new token"},
		{name: "not yet valid", token: build(func(a *auth.Spec) { a.Issued = a.Issued.Add(5 * time.Minute) }), status: 401, code: "token-invalid", says: "future"},
		{name: "valid for too long", token: hand(func(d *draft) { d.seconds = 86_401 }), status: 401, code: "token-invalid", says: "86,400"},
		{name: "lifetime that overflows", token: hand(func(d *draft) { d.seconds = 1<<32 - 1 }), status: 401, code: "token-invalid", says: "86,400"},
		{name: "wrong certificate", token: build(func(a *auth.Spec) { a.Certificate = strings.Repeat("0", 32) }), status: 401, code: "token-invalid", says: "certificate"},
		{name: "another app's", token: s.regions["us"]["COFFER_TOKEN"], status: 401, code: "token-invalid", says: "another app"},
		{name: "another app, own certificate", token: build(func(a *auth.Spec) { a.AppID = s.app[:31] + flip(s.app[31]) }), status: 401, code: "token-invalid", says: "another app"},
		{name: "malformed app", token: build(func(a *auth.Spec) { a.AppID = "x" }), status: 401, code: "token-invalid", says: "another app"},
		{name: "bytes after the services", token: hand(func(d *draft) { d.after = []byte{0} }), status: 401, code: "token-invalid", says: "AccessToken2"},
		{name: "a service twice", token: hand(func(d *draft) { d.count, d.services = 2, append(chat("ann", 1), chat("", 2)...) }), status: 401, code: "token-invalid", says: "AccessToken2"},
		{name: "fewer services than said", token: hand(func(d *draft) { d.count = 2 }), status: 401, code: "token-invalid", says: "AccessToken2"},
		{name: "no service", token: hand(func(d *draft) { d.count, d.services = 0, nil }), status: 403, code: "privilege-missing", says: "privilege"},
		{name: "unknown privilege", token: hand(func(d *draft) { d.services = chat("", 9) }), status: 403, code: "privilege-missing", says: "privilege"},
		{name: "a user with the app's privilege", token: hand(func(d *draft) { d.services = chat("ann", 2) }), status: 403, code: "privilege-missing", says: "privilege"},
		{name: "nobody with a user's privilege", token: hand(func(d *draft) { d.services = chat("", 1) }), status: 403, code: "privilege-missing", says: "privilege"},
		{name: "another user's", token: s.userToken("eve"), status: 403, code: "privilege-missing", says: ""},
		{name: "operator's", token: s.operator, status: 403, code: "privilege-missing", says: "operator"},
		{name: "operator's, cut", token: s.operator[:len(s.operator)-1], status: 401, code: "token-invalid"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.token == "" {
				c.token = "-"
			}
			r := s.build(t.Context(), request{method: http.MethodPost, path: s.events(), token: c.token, body: sent(fmt.Sprint("bad-", i), "ann", "ben", "x")})
			if c.change != nil {
				c.change(r)
			}
			resp, err := s.client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			a := answer{resp.StatusCode, resp.Header, body}
			if code := a.code(t); a.status != c.status || code != c.code || !strings.Contains(string(body), c.says) {
				t.Fatalf("%d %s", a.status, body)
			}
			if len(c.token) > 8 && bytes.Contains(body, []byte(c.token)) {
				t.Error("the answer repeats the token")
			}
		})
	}
	last := s.post(sent("last", "ann", "ben", "last"))
	if events, _ := s.replay("?min_position=" + last[0]); strings.Join(ids(events), " ") != "last" {
		t.Errorf("stored: %v", ids(events))
	}
}

// TestBadFraming sends bytes that are no proper request: each is refused or cut,
// and nothing is stored.
func TestBadFraming(t *testing.T) {
	s := newSite(t, config.Limits{BodyTimeout: config.Duration(2 * time.Second)})
	event := sent("bad", "ann", "ben", "x")
	head := "POST " + s.events() + " HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + s.token + "\r\nContent-Type: application/json\r\n"
	sized := func(n int) string { return fmt.Sprintf("Content-Length: %d\r\n", n) }
	for _, c := range []struct {
		name, text string
		want       string // of the status line; empty: no answer
		open       bool   // speak without TLS
	}{
		{"garbage", "\x00\x01\x02\x03\r\n\r\n", "400", false},
		{"without TLS", head + sized(len(event)) + "\r\n" + event, "400", true},
		{"no host", strings.Replace(head, "Host: localhost\r\n", "", 1) + sized(len(event)) + "\r\n" + event, "400", false},
		{"NUL in a header", head + "X-A: a\x00b\r\n" + sized(len(event)) + "\r\n" + event, "400", false},
		{"header over its limit", head + "X-A: " + strings.Repeat("a", 64<<10) + "\r\n" + sized(len(event)) + "\r\n" + event, "431", false},
		{"two lengths", head + sized(len(event)) + sized(len(event)-1) + "\r\n" + event, "400", false},
		{"negative length", head + sized(-1) + "\r\n" + event, "400", false},
		{"length that is none", head + "Content-Length: 1e3\r\n\r\n" + event, "400", false},
		{"unknown transfer encoding", head + "Transfer-Encoding: gzip\r\n\r\n" + event, "501", false},
		{"bad size of a chunk", head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n" + event + "\r\n0\r\n\r\n", "400", false},
		{"chunk that is longer than said", head + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(event)-1, event), "400", false},
		{"chunks without an end", head + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", len(event), event), "408", false},
		{"shorter than its length", head + sized(len(event)+1) + "\r\n" + event, "408", false},
		{"longer than its length", head + sized(len(event)-1) + "\r\n" + event, "400", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var conn net.Conn
			var err error
			address := strings.TrimPrefix(s.url, "https://")
			if c.open {
				conn, err = (&net.Dialer{}).DialContext(t.Context(), "tcp", address)
			} else {
				conn, err = (&tls.Dialer{Config: s.transport(false).TLSClientConfig}).DialContext(t.Context(), "tcp", address)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			_ = conn.SetDeadline(time.Now().Add(time.Minute)) // bounds a hang
			_, _ = io.WriteString(conn, c.text)               // the server may have hung up before the end
			status, err := bufio.NewReader(conn).ReadString('\n')
			if fields := strings.Fields(status); len(fields) < 2 || fields[1] != c.want {
				t.Errorf("answered %q, %v; want %s", status, err, c.want)
			}
		})
	}
	// A caller that leaves in the middle of its body.
	for n := 1; n < len(event); n += 17 {
		conn, err := (&tls.Dialer{Config: s.transport(false).TLSClientConfig}).DialContext(t.Context(), "tcp", strings.TrimPrefix(s.url, "https://"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, head+sized(len(event))+"\r\n"+event[:n])
		_ = conn.Close()
	}
	last := s.post(sent("last", "ann", "ben", "last"))
	if events, _ := s.replay("?min_position=" + last[0]); strings.Join(ids(events), " ") != "last" {
		t.Errorf("stored: %v", ids(events))
	}
}

// TestBadAcknowledgements leave the inbox as it is.
func TestBadAcknowledgements(t *testing.T) {
	s := newSite(t, config.Limits{})
	positions := s.fill(9)
	inbox := "/v1/apps/" + s.app + "/users/ben/inbox"
	before := s.do(request{path: inbox})
	if before.status != http.StatusOK || len(before.json(t)["data"].([]any)) == 0 {
		t.Fatalf("%d %s", before.status, before.body)
	}
	page := s.do(request{path: inbox + "?limit=1"}).json(t)
	cursor, ok := page["next"].(string)
	if !ok {
		t.Fatalf("no cursor: %v", page)
	}
	events := s.do(request{path: s.events() + "?limit=1"}).json(t)["next"].(string)
	through := func(place string) string { return fmt.Sprintf(`{"through":%q}`, place) }
	for _, c := range []struct {
		name   string
		r      request
		status int
		code   string
	}{
		{"malformed", request{body: `{"through":`}, 400, "invalid-request"},
		{"empty", request{reader: strings.NewReader("")}, 400, "invalid-request"},
		{"array", request{body: "[]"}, 400, "invalid-request"},
		{"unknown member", request{body: `{"through":"1","all":true}`}, 400, "invalid-request"},
		{"twice", request{body: `{"through":"1","through":"2"}`}, 400, "invalid-request"},
		{"invalid UTF-8", request{body: "{\"through\":\"\xff\"}"}, 400, "invalid-request"},
		{"number", request{body: `{"through":1}`}, 400, "invalid-request"},
		{"no place", request{body: through("x")}, 400, "invalid-request"},
		{"negative", request{body: through("-1")}, 400, "invalid-request"},
		{"out of range", request{body: through("18446744073709551616")}, 400, "invalid-request"},
		{"forged cursor", request{body: through(cursor[:len(cursor)-2] + flip(cursor[len(cursor)-2]) + cursor[len(cursor)-1:])}, 400, "cursor-mismatch"},
		{"cursor of another list", request{body: through(events)}, 400, "cursor-mismatch"},
		{"cursor of another user", request{path: "/v1/apps/" + s.app + "/users/ann/inbox/ack", body: through(cursor)}, 400, "cursor-mismatch"},
		{"over its limit", request{body: through(strings.Repeat("1", 64<<10))}, 413, "payload-too-large"},
		{"wrong type", request{body: through(positions[8]), header: map[string]string{"Content-Type": "text/plain"}}, 415, "unsupported-media-type"},
		{"another user", request{body: through(positions[8]), token: s.userToken("ann")}, 404, "not-found"},
		{"operator", request{body: through(positions[8]), token: s.operator}, 403, "privilege-missing"},
		{"bad user", request{path: "/v1/apps/" + s.app + "/users/a*b/inbox/ack", body: through(positions[8])}, 400, "invalid-request"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.r.method = http.MethodPost
			if c.r.path == "" {
				c.r.path = inbox + "/ack"
			}
			a := s.do(c.r)
			if code := a.code(t); a.status != c.status || code != c.code {
				t.Errorf("%d %s", a.status, a.body)
			}
		})
	}
	after := s.do(request{path: inbox})
	if got, want := after.json(t), before.json(t); fmt.Sprint(got["data"], got["acked"]) != fmt.Sprint(want["data"], want["acked"]) {
		t.Errorf("the inbox has changed: %s", after.body)
	}
}
