package keyserverstest

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
)

// Front stands before a key server: at an address that stays while the server
// behind it goes, and it does what networks and servers do in bad times.
type Front struct {
	*httptest.Server

	mu       sync.Mutex // guards what follows
	behind   string
	rule     http.HandlerFunc
	before   func(*http.Request)
	release  chan struct{} // ends hanging
	requests map[string]int
}

// NewFront returns a front that stands before nothing yet: see Point.
func NewFront(t *testing.T) *Front {
	t.Helper()
	f := &Front{requests: map[string]int{}}
	transport := &http.Transport{}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		f.mu.Lock()
		behind, rule, before := f.behind, f.rule, f.before
		f.requests[r.URL.Path]++
		f.mu.Unlock()
		if before != nil {
			before(r)
		}
		if rule != nil {
			rule(w, r)
			return
		}
		target, err := url.Parse(behind)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		(&httputil.ReverseProxy{
			Rewrite:      func(p *httputil.ProxyRequest) { p.SetURL(target) },
			Transport:    transport,
			ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }, // as a server that is gone
		}).ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		f.Set(nil)
		f.CloseClientConnections()
		f.Close()
		transport.CloseIdleConnections()
	})
	return f
}

// Set lets a handler answer instead of the server; nil undoes it, and what Answer
// and Hang do.
func (f *Front) Set(rule http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rule = rule
	if f.release != nil {
		close(f.release)
		f.release = nil
	}
}

// Answer lets every request have a status.
func (f *Front) Answer(status int) {
	f.Set(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, `{"errors":[]}`)
	})
}

// Hang lets no request have an answer.
func (f *Front) Hang() {
	release := make(chan struct{})
	f.Set(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-release:
		}
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	f.release = release
}

// Before calls f with each request, before it is passed on; nil undoes it.
func (f *Front) Before(before func(*http.Request)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before = before
}

// Point names the server behind.
func (f *Front) Point(to string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.behind = to
}

// Count returns how many requests there were for paths that end so.
func (f *Front) Count(suffix string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for path, times := range f.requests {
		if strings.HasSuffix(path, suffix) {
			n += times
		}
	}
	return n
}
