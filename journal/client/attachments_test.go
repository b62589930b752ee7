package client

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// attachmentServer keeps one attachment, and breaks off answers after each number
// of bytes in cuts, and uploads likewise while refuse is not 0.
type attachmentServer struct {
	t *testing.T

	mu      sync.Mutex // guards what follows
	content []byte
	cuts    []int
	refuse  int
	whole   bool // no ranges
	asked   []string
}

func (s *attachmentServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.URL.Path != "/v1/apps/"+testApp.String()+"/attachments/pic-1" {
		s.t.Errorf("asked for %s", r.URL)
	}
	s.asked = append(s.asked, strings.TrimSpace(r.Method+" "+r.Header.Get("Range")))
	switch {
	case r.Method == http.MethodPut:
		s.put(w, r)
		return
	case s.content == nil:
		problemJSON(w, http.StatusNotFound, "not-found", "no such attachment", false)
		return
	case r.Method == http.MethodDelete:
		s.content = nil
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if s.whole {
		r.Header.Del("Range")
	}
	sum := sha256.Sum256(s.content)
	w.Header().Set("Repr-Digest", "md5=:AAAA:, sha-256=:"+base64.StdEncoding.EncodeToString(sum[:])+":")
	w.Header().Set("Content-Type", "image/png")
	if r.Method == http.MethodGet && len(s.cuts) > 0 {
		w = &cutWriter{ResponseWriter: w, left: s.cuts[0]}
		s.cuts = s.cuts[1:]
	}
	http.ServeContent(w, r, "", time.Unix(1_700_000_000, 0), bytes.NewReader(s.content))
}

func (s *attachmentServer) put(w http.ResponseWriter, r *http.Request) {
	if s.refuse > 0 {
		s.refuse--
		_, _ = io.CopyN(io.Discard, r.Body, int64(len(s.asked))*1000)
		panic(http.ErrAbortHandler)
	}
	content, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client has gone
	}
	sum := sha256.Sum256(content)
	digest := base64.StdEncoding.EncodeToString(sum[:])
	if r.Header.Get("Content-Digest") != "sha-256=:"+digest+":" || r.ContentLength != int64(len(content)) {
		s.t.Errorf("%d bytes, %v", r.ContentLength, r.Header)
	}
	s.content = content
	w.WriteHeader(http.StatusCreated)
	_, _ = fmt.Fprintf(w, `{"id":"pic-1","size":"%d","sha256":%q,"media_type":%q,"conversation":%q,"sender":%q,"stored":"2026-01-02T03:04:05.678Z","expires":"2026-01-09T03:04:05.678Z"}`,
		len(content), digest, r.Header.Get("Content-Type"), r.URL.Query().Get("conversation")+"/"+r.URL.Query().Get("conversationtype"), r.URL.Query().Get("sender"))
}

func (s *attachmentServer) change(whole bool, content []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.whole, s.content = whole, content
}

// cutWriter ends the connection after so many bytes.
type cutWriter struct {
	http.ResponseWriter

	left int
}

func (w *cutWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p[:min(len(p), w.left)])
	if w.left -= n; w.left == 0 {
		_ = http.NewResponseController(w.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * i >> 7)
	}
	return b
}

// TestAttachmentOverCuts: up and down over connections that are cut in the
// middle, without fetching again what has arrived.
func TestAttachmentOverCuts(t *testing.T) {
	srv := &attachmentServer{t: t, refuse: 2, cuts: []int{1000, 120_000}}
	c := start(t, srv.ServeHTTP)
	content := pattern(200_000)
	put, err := c.PutAttachment(t.Context(), AttachmentSpec{
		ID: "pic-1", MediaType: "image/png", Conversation: "room-1", ConversationType: journal.Room, Sender: "ann",
	}, bytes.NewReader(content), int64(len(content)))
	if err != nil || put.Size != 200_000 || put.SHA256 != sha256.Sum256(content) || put.MediaType != "image/png" ||
		put.Conversation != "room-1/room" || put.Sender != "ann" || put.Expires.Sub(put.Stored) != 7*24*time.Hour {
		t.Fatalf("%+v, %v", put, err)
	}
	a, err := c.Attachment(t.Context(), "pic-1")
	if err != nil || a.Size != put.Size || a.SHA256 != put.SHA256 || a.MediaType != "image/png" || a.Stored.Unix() != 1_700_000_000 {
		t.Fatalf("%+v, %v", a, err)
	}
	var got bytes.Buffer
	if err := c.AttachmentContent(t.Context(), a, nil, &got); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("%d bytes, %v", got.Len(), err)
	}
	// What an earlier call has brought is not fetched again.
	got.Reset()
	if err := c.AttachmentContent(t.Context(), a, bytes.NewReader(content[:150_000]), &got); err != nil || !bytes.Equal(got.Bytes(), content[150_000:]) {
		t.Errorf("%d bytes, %v", got.Len(), err)
	}
	if err := c.AttachmentContent(t.Context(), a, bytes.NewReader(content), &got); err != nil {
		t.Error(err)
	}
	srv.mu.Lock()
	asked := strings.Join(srv.asked, "|")
	srv.mu.Unlock()
	want := "PUT|PUT|PUT|HEAD|GET|GET bytes=1000-|GET bytes=121000-|GET bytes=150000-"
	if asked != want {
		t.Errorf("asked %s\nwant  %s", asked, want)
	}
	if err := c.DeleteAttachment(t.Context(), "pic-1"); err != nil {
		t.Error(err)
	}
	for _, err := range []error{c.DeleteAttachment(t.Context(), "pic-1"), second(c.Attachment(t.Context(), "pic-1"))} {
		if !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
	}
}

func second(_ Attachment, err error) error { return err }

// TestAttachmentOfNothing: no bytes are an attachment too.
func TestAttachmentOfNothing(t *testing.T) {
	srv := &attachmentServer{t: t}
	c := start(t, srv.ServeHTTP)
	if put, err := c.PutAttachment(t.Context(), AttachmentSpec{ID: "pic-1"}, strings.NewReader(""), 0); err != nil || put.MediaType != "application/octet-stream" {
		t.Fatalf("%+v, %v", put, err)
	}
	a, err := c.Attachment(t.Context(), "pic-1")
	if err != nil || a.Size != 0 {
		t.Fatalf("%+v, %v", a, err)
	}
	if err := c.AttachmentContent(t.Context(), a, nil, io.Discard); err != nil {
		t.Error(err)
	}
}

// TestAttachmentDistrusts what is here, what arrives, and what it is to send.
func TestAttachmentDistrusts(t *testing.T) {
	content := pattern(5000)
	srv := &attachmentServer{t: t, content: content}
	c := start(t, srv.ServeHTTP)
	a, err := c.Attachment(t.Context(), "pic-1")
	if err != nil {
		t.Fatal(err)
	}
	for name, have := range map[string]string{
		"another beginning": strings.Repeat("x", 100), "another whole": strings.Repeat("x", 5000), "more than the whole": string(content) + "x",
	} {
		if err := c.AttachmentContent(t.Context(), a, strings.NewReader(have), io.Discard); !errors.Is(err, ErrDigest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	srv.change(true, content)
	if err := c.AttachmentContent(t.Context(), a, bytes.NewReader(content[:100]), io.Discard); !errors.Is(err, ErrProtocol) {
		t.Errorf("a range that is none: %v", err)
	}
	srv.change(false, pattern(4999))
	var got bytes.Buffer
	if err := c.AttachmentContent(t.Context(), a, nil, &got); !errors.Is(err, ErrDigest) || got.Len() > 0 {
		t.Errorf("another attachment: %d bytes, %v", got.Len(), err)
	}
	spec := AttachmentSpec{ID: "pic-1", SHA256: sha256.Sum256(content)}
	if _, err := c.PutAttachment(t.Context(), spec, bytes.NewReader(content[:4000]), 5000); !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, ErrUnavailable) {
		t.Errorf("content that is shorter: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.AttachmentContent(ctx, a, nil, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
