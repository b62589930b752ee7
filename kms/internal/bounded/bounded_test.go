package bounded_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/cofferdb/coffer/kms/internal/bounded"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestAnswersAreBounded(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.URL.Query().Get("n"))
		_, _ = io.WriteString(w, strings.Repeat("x", n))
	}))
	defer server.Close()
	transport := bounded.New(nil, 1000)
	defer transport.Close()
	for _, n := range []int{0, 999, 1000, 1001, 100_000} {
		got, err := get(t, transport, server.URL+"?n="+strconv.Itoa(n))
		if n <= 1000 && (err != nil || len(got) != n) || n > 1000 && (!errors.Is(err, bounded.ErrTooLarge) || len(got) != 1000) {
			t.Errorf("%d bytes: got %d and %v", n, len(got), err)
		}
	}
}

func TestRedirectsAreErrors(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/elsewhere" {
			t.Error("the redirect was followed")
		}
		if r.URL.Path == "/unled" {
			w.WriteHeader(http.StatusMultipleChoices) // leads nowhere, and is no success
			return
		}
		http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
	}))
	defer server.Close()
	transport := bounded.New(nil, 1000)
	defer transport.Close()
	for _, path := range []string{"", "/unled"} {
		if _, err := get(t, transport, server.URL+path); !errors.Is(err, bounded.ErrRedirect) {
			t.Errorf("%q: %v, want ErrRedirect", path, err)
		}
	}
}

func TestCloseEndsRequests(t *testing.T) {
	arrived := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
	}))
	defer server.Close()
	transport := bounded.New(nil, 1000)
	go func() { <-arrived; transport.Close() }()
	if _, err := get(t, transport, server.URL); err == nil {
		t.Error("the request succeeded")
	}
	if _, err := get(t, transport, server.URL); err == nil {
		t.Error("a request after Close succeeded")
	}
}

func get(t *testing.T, transport *bounded.Transport, url string) ([]byte, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.Client().Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}
