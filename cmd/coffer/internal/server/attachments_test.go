package server_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// attach sends a request about an attachment and returns the answer, read.
func (s *site) attach(method, id, token string, body io.Reader, header map[string]string) (*http.Response, []byte) {
	s.t.Helper()
	request, err := http.NewRequestWithContext(s.t.Context(), method, s.url+"/v1/apps/"+s.app+"/attachments/"+id, body)
	if err != nil {
		s.t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+token)
	for name, value := range header {
		request.Header.Set(name, value)
	}
	response, err := s.client.Do(request)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return response, content
}

func png() map[string]string { return map[string]string{"Content-Type": "image/png"} }

func digestOf(content []byte) string {
	sum := sha256.Sum256(content)
	return "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
}

// TestAttachments: up, down, in ranges, again, and the event that tells of it.
func TestAttachments(t *testing.T) {
	s := newSite(t, config.Limits{AttachmentBytes: 300_000})
	content := bytes.Repeat([]byte("0123456789"), 20_000)
	header := png()
	header["Content-Digest"] = "md5=:AAAA:, " + digestOf(content)
	for i, want := range []int{201, 200} {
		response, body := s.attach("PUT", "pic-1?conversation=room-1&sender=ann", s.token, bytes.NewReader(content), header)
		if response.StatusCode != want || !strings.Contains(string(body), `"size":"200000"`) || !strings.Contains(string(body), `"sender":"ann"`) {
			t.Fatalf("upload %d: %d %s", i, response.StatusCode, body)
		}
	}
	events := s.await("?type=attachment.stored", 1)
	if len(events) != 1 || !strings.Contains(fmt.Sprint(events[0]), "attachment:pic-1") {
		t.Errorf("events: %v", events)
	}
	response, got := s.attach("GET", "pic-1", s.token, nil, nil)
	sum := sha256.Sum256(content)
	etag := `"` + hex.EncodeToString(sum[:]) + `"`
	if response.StatusCode != 200 || !bytes.Equal(got, content) || response.Header.Get("Content-Type") != "image/png" ||
		response.Header.Get("Repr-Digest") != digestOf(content) || response.Header.Get("Etag") != etag {
		t.Errorf("%d, %d bytes, %v", response.StatusCode, len(got), response.Header)
	}
	for _, tt := range []struct {
		header, value string
		status        int
		from, to      int
	}{
		{"Range", "bytes=0-0", 206, 0, 1},
		{"Range", "bytes=65530-65541", 206, 65530, 65542},
		{"Range", "bytes=199999-", 206, 199999, 200000},
		{"Range", "bytes=-5", 206, 199995, 200000},
		{"Range", "bytes=5-1000000", 206, 5, 200000},
		{"Range", "bytes=0-1,5-6", 200, 0, 200000},
		{"Range", "lines=0-1", 200, 0, 200000},
		{"If-None-Match", etag, 304, 0, 0},
	} {
		response, got := s.attach("GET", "pic-1", s.token, nil, map[string]string{tt.header: tt.value})
		if response.StatusCode != tt.status || !bytes.Equal(got, content[tt.from:tt.to]) {
			t.Errorf("%s: %d, %d bytes", tt.value, response.StatusCode, len(got))
		}
	}
	response, got = s.attach("GET", "pic-1", s.token, nil, map[string]string{"Range": "bytes=200000-"})
	if response.StatusCode != 416 || response.Header.Get("Content-Range") != "bytes */200000" || !strings.Contains(string(got), "range-not-satisfiable") {
		t.Errorf("beyond the end: %d %s %v", response.StatusCode, got, response.Header)
	}
	if response, _ := s.attach("HEAD", "pic-1", s.token, nil, nil); response.StatusCode != 200 || response.ContentLength != 200_000 {
		t.Errorf("HEAD: %d %d", response.StatusCode, response.ContentLength)
	}
}

// TestAttachmentsOfUsers: a user sends as itself, and reads what it has sent and
// what is in its conversations.
func TestAttachmentsOfUsers(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.post(member("joined", "j1", "ann", "g"), member("joined", "j2", "ben", "g"), member("joined", "j3", "cid", "h"))
	ann, ben := s.userToken("ann"), s.userToken("ben")
	for _, tt := range []struct {
		method, id, token string
		want              int
	}{
		{"PUT", "a", ann, 201},
		{"GET", "a", ann, 200},
		{"GET", "a", ben, 404},
		{"GET", "a", s.token, 200},
		{"PUT", "a?sender=ann", s.token, 200},
		{"PUT", "b?sender=ben", ann, 403},
		{"GET", "b", s.token, 404},
		{"DELETE", "a", ann, 403},
		{"GET", "a", s.operator, 403},
		{"GET", "a", "x", 401},
		{"PUT", "c?conversation=g", ann, 201},
		{"GET", "c", ben, 200},
		{"GET", "c", s.userToken("cid"), 404},
		{"PUT", "d?conversation=h", ann, 404},
		{"DELETE", "a", s.token, 204},
		{"GET", "a", ann, 404},
		{"DELETE", "a", s.token, 404},
	} {
		var body io.Reader
		if tt.method == "PUT" {
			body = strings.NewReader("content")
		}
		if response, got := s.attach(tt.method, tt.id, tt.token, body, png()); response.StatusCode != tt.want {
			t.Errorf("%s %s: %d %s, want %d", tt.method, tt.id, response.StatusCode, got, tt.want)
		}
	}
}

// TestBadAttachments: each with its own error, and nothing is stored.
func TestBadAttachments(t *testing.T) {
	s := newSite(t, config.Limits{AttachmentBytes: 100_000})
	with := func(name, value string) map[string]string {
		h := png()
		h[name] = value
		return h
	}
	for what, tt := range map[string]struct {
		id     string
		body   string
		header map[string]string
		status int
		code   string
	}{
		"too long":               {"a", strings.Repeat("x", 100_001), png(), 413, "payload-too-large"},
		"another digest":         {"a", "x", with("Content-Digest", digestOf([]byte("y"))), 400, "invalid-request"},
		"a digest of no form":    {"a", "x", with("Content-Digest", "sha-256=abc"), 400, "invalid-request"},
		"a digest cut short":     {"a", "x", with("Content-Digest", "sha-256=:AAAA:"), 400, "invalid-request"},
		"no type":                {"a", "x", nil, 415, "unsupported-media-type"},
		"a type of no form":      {"a", "x", with("Content-Type", "png;;"), 415, "unsupported-media-type"},
		"packed":                 {"a", "x", with("Content-Encoding", "gzip"), 415, "unsupported-media-type"},
		"an id with a wildcard":  {"a%3E", "x", png(), 400, "invalid-request"},
		"an id that is too long": {strings.Repeat("a", 118), "x", png(), 400, "invalid-request"},
		"a bad conversation":     {"a?conversation=a%20b", "x", png(), 400, "invalid-request"},
		"a bad sender":           {"a?sender=a*", "x", png(), 400, "invalid-request"},
		"an unknown parameter":   {"a?name=x", "x", png(), 400, "invalid-request"},
	} {
		response, body := s.attach("PUT", tt.id, s.token, strings.NewReader(tt.body), tt.header)
		if response.StatusCode != tt.status || !strings.Contains(string(body), tt.code) {
			t.Errorf("%s: %d %s", what, response.StatusCode, body)
		}
	}
	// In pieces, without a length, and without an end.
	reader, writer := io.Pipe()
	go func() {
		for {
			if _, err := writer.Write(make([]byte, 10_000)); err != nil {
				return
			}
		}
	}()
	response, _ := s.attach("PUT", "a", s.token, reader, png())
	_ = reader.Close()
	if response.StatusCode != 413 {
		t.Errorf("endless: %d", response.StatusCode)
	}
	s.cutUpload("a")
	if response, _ := s.attach("GET", "a", s.token, nil, nil); response.StatusCode != 404 {
		t.Errorf("something is stored: %d", response.StatusCode)
	}
	if events, _ := s.replay(""); len(events) != 0 {
		t.Errorf("events: %v", events)
	}
}

// cutUpload sends less than it says, and goes.
func (s *site) cutUpload(id string) {
	s.t.Helper()
	host := strings.TrimPrefix(s.url, "https://")
	raw, err := (&net.Dialer{Timeout: time.Minute}).DialContext(s.t.Context(), "tcp", host)
	if err != nil {
		s.t.Fatal(err)
	}
	transport := s.client.Transport.(*http.Transport) //nolint:forcetypeassert // newClient's
	conf := transport.TLSClientConfig.Clone()
	conf.ServerName, conf.NextProtos = "localhost", nil
	conn := tls.Client(raw, conf)
	_, err = fmt.Fprintf(conn, "PUT /v1/apps/%s/attachments/%s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Type: image/png\r\nContent-Length: 90000\r\n\r\n%s",
		s.app, id, host, s.token, strings.Repeat("x", 80_000))
	if err != nil {
		s.t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		s.t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, conn) // until the server has given up
	_ = conn.Close()
}
