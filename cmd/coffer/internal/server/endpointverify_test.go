package server_test

import (
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
)

// challenges is a server that is asked for challenges, and gives back those that
// come to a path ending in /yes.
type challenges struct {
	*httptest.Server

	mu    sync.Mutex // guards asked
	asked func()     // during each request, once
}

func (c *challenges) serve(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	asked := c.asked
	c.asked = nil
	c.mu.Unlock()
	if asked != nil {
		asked()
	}
	var event struct {
		Data json.RawMessage `json:"data"`
	}
	if strings.HasSuffix(r.URL.Path, "/yes") && json.NewDecoder(r.Body).Decode(&event) == nil {
		_, _ = w.Write(event.Data)
	}
}

// TestVerification: no order of changes enables an endpoint at a URL that has not
// given a challenge back.
func TestVerification(t *testing.T) {
	c := &challenges{}
	c.Server = httptest.NewUnstartedServer(http.HandlerFunc(c.serve))
	c.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	c.StartTLS()
	t.Cleanup(c.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSiteWith(t, node.DevOptions{Callbacks: config.Callbacks{Allow: []string{"127.0.0.0/8"}, CAFile: ca}})
	base := "/v1/apps/" + s.app + "/endpoints"
	yes, no := `"url": "`+c.URL+`/yes"`, `"url": "`+c.URL+`/no"`
	const enable, disable = `"state": "enabled"`, `"state": "disabled"`
	for name, tt := range map[string]struct {
		create  string
		during  string // a change while the challenge is under way
		changes []string
		want    string
	}{
		"verified":                         {yes, "", nil, "enabled "},
		"not verified":                     {no, "", nil, "unverified verification"},
		"disabled and enabled":             {no, "", []string{disable, enable}, "unverified verification"},
		"disabled twice":                   {no, "", []string{disable, disable}, "disabled verification"},
		"moved":                            {yes, "", []string{no}, "unverified verification"},
		"moved while disabled":             {yes, "", []string{disable, no}, "disabled verification"},
		"moved while disabled, enabled":    {yes, "", []string{disable, no, enable}, "unverified verification"},
		"moved and enabled at once":        {yes, "", []string{disable, no + ", " + enable}, "unverified verification"},
		"moved back while disabled":        {yes, "", []string{disable, no, yes, enable}, "enabled "},
		"enabled when verified":            {no, "", []string{disable, yes, enable}, "enabled "},
		"disabled by its owner, enabled":   {yes, "", []string{disable, enable}, "enabled "},
		"disabled by its owner":            {yes, "", []string{disable}, "disabled caller"},
		"moved during the verification":    {yes, no, nil, "unverified verification"},
		"disabled during the verification": {yes, disable, nil, "disabled verification"},
	} {
		if tt.during != "" {
			c.mu.Lock()
			c.asked = func() {
				all := s.do(request{path: base}).json(t)["data"].([]any)                                                                                 //nolint:errcheck,forcetypeassert // the test ends
				last := all[len(all)-1].(map[string]any)                                                                                                 //nolint:errcheck,forcetypeassert // the test ends
				if a := s.do(request{method: "PATCH", path: base + "/" + last["id"].(string), body: "{" + tt.during + "}"}); a.status != http.StatusOK { //nolint:errcheck,forcetypeassert // the test ends
					t.Errorf("%s: %d %s", name, a.status, a.body)
				}
			}
			c.mu.Unlock()
		}
		made := s.do(request{method: "POST", path: base, body: "{" + tt.create + "}"})
		if made.status != http.StatusCreated {
			t.Fatalf("%s: %d %s", name, made.status, made.body)
		}
		path := base + "/" + made.json(t)["id"].(string) //nolint:errcheck,forcetypeassert // the test ends
		for _, change := range tt.changes {
			if a := s.do(request{method: "PATCH", path: path, body: "{" + change + "}"}); a.status != http.StatusOK {
				t.Errorf("%s: %d %s", name, a.status, a.body)
			}
		}
		now := s.do(request{path: path}).json(t)
		reason, _ := now["reason"].(string)
		if got := now["state"].(string) + " " + reason; got != tt.want { //nolint:errcheck,forcetypeassert // the test ends
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
	if a := s.do(request{method: "POST", path: base, body: "{" + no + `, "certificate": "x", "certificate_key": "y"}`}); a.code(t) != "endpoint-invalid" {
		t.Errorf("a certificate that is none: %d %s", a.status, a.body)
	}
	if a := s.do(request{method: "POST", path: base, body: "{" + no + `, "headers": {"x-key": "a", "X-Key": "b"}}`}); a.code(t) != "endpoint-invalid" {
		t.Errorf("one header twice: %d %s", a.status, a.body)
	}
}
