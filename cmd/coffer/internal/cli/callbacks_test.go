package cli

import (
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestEndpointsWithoutProgress: how far an endpoint has come is not known when the
// view has stopped, and zeros would say that nothing waits.
func TestEndpointsWithoutProgress(t *testing.T) {
	const (
		known   = `{"id":"00000000000000000000000000000001","url":"https://a.example/","state":"enabled","progress":{"number":"7","position":"0","delivered":7,"waiting":1,"held":2,"parked":4,"paused":"keys"}}`
		unknown = `{"id":"00000000000000000000000000000002","url":"https://b.example/","state":"disabled","reason":"failing"}`
	)
	var answer string
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if !strings.HasSuffix(q.URL.Path, "/endpoints") {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"data":[`+answer+`]}`)
	}))
	t.Cleanup(srv.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"COFFER_URL": srv.URL, "COFFER_CA": ca, "COFFER_APP": "01" + strings.Repeat("0", 29) + "1"} {
		t.Setenv(name, value) // kong reads them from the process
	}
	for _, tt := range []struct {
		answer, said string
		rows         []string
	}{
		{known, "", []string{"00000000000000000000000000000001 enabled, paused: keys 7 3 4 https://a.example/"}},
		{known + "," + unknown, "has stopped", []string{
			"00000000000000000000000000000001 enabled, paused: keys 7 3 4 https://a.example/",
			"00000000000000000000000000000002 disabled (failing) - - - https://b.example/",
		}},
	} {
		answer = tt.answer
		code, stdout, stderr := run(t, []string{"COFFER_TOKEN=token"}, "callbacks", "endpoints")
		if code != ExitOK {
			t.Fatalf("%d: %s", code, stderr)
		}
		var rows []string
		for line := range strings.Lines(stdout) {
			rows = append(rows, strings.Join(strings.Fields(line), " "))
		}
		if want := append([]string{"ID STATE DELIVERED WAITING PARKED URL"}, tt.rows...); strings.Join(rows, "\n") != strings.Join(want, "\n") {
			t.Errorf("printed %q, want %q", rows, want)
		}
		if tt.said == "" && stderr != "" || !strings.Contains(stderr, tt.said) {
			t.Errorf("said %q", stderr)
		}
	}
}
