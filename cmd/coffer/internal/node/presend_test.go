package node

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/journal/embedded"
)

// TestTwoProcessesAsk serves a region from two processes, each of which asks for
// itself: what one has stored is not asked about by the other, and when both ask
// at the same time what is stored counts for both.
func TestTwoProcessesAsk(t *testing.T) {
	checkLeaks(t)
	var mu sync.Mutex
	asked := make(map[string]int)
	answer := func(string, int) string { return `{"decision":"allow"}` }
	judge := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var q struct {
			Data struct {
				ID        string `json:"id"`
				Challenge string `json:"challenge"`
			} `json:"data"`
		}
		body, err := io.ReadAll(r.Body)
		if err != nil || json.Unmarshal(body, &q) != nil {
			return
		}
		if q.Data.Challenge != "" {
			_ = json.NewEncoder(w).Encode(map[string]string{"challenge": q.Data.Challenge})
			return
		}
		mu.Lock()
		asked[q.Data.ID]++
		n, answer := asked[q.Data.ID], answer
		mu.Unlock()
		_, _ = io.WriteString(w, answer(q.Data.ID, n))
	}))
	judge.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	judge.StartTLS()
	defer judge.Close()
	answers := func(f func(id string, n int) string) {
		mu.Lock()
		defer mu.Unlock()
		answer = f
	}
	times := func(id string) int {
		mu.Lock()
		defer mu.Unlock()
		return asked[id]
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: judge.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	nats, err := embedded.Start(t.Context(), embedded.Options{StoreDir: t.TempDir(), Listen: "127.0.0.1:0", SyncAlways: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = nats.Close() }()
	cfg := plain(production(t, "[region.nats]\nurl = \"nats://127.0.0.1:4222\"\n"))
	cfg.Regions[0].NATS.URL = nats.ClientURL()
	cfg.Callbacks = config.Callbacks{Allow: []string{"127.0.0.0/8"}, CAFile: ca, PresendTimeout: config.Duration(30 * time.Second)}
	open := func(dir string) *Process {
		cfg := cfg
		cfg.DataDir = filepath.Join(cfg.DataDir, dir)
		p, err := Open(t.Context(), cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := p.Close(t.Context()); err != nil {
				t.Error(err)
			}
		})
		return p
	}
	a := open("a")
	token, events := appendOne(t, a)
	app := strings.TrimSuffix(events, "/events")
	status, made := call(t, a, "POST", app+"/endpoints", token, `{"url":"`+judge.URL+`","asked_only":true}`)
	var endpoint struct{ ID, State string }
	if err := json.Unmarshal([]byte(made), &endpoint); err != nil || endpoint.State != "enabled" {
		t.Fatalf("made: %d %s", status, made)
	}
	if status, set := call(t, a, "PUT", app+"/presend", token, `{"endpoint":"`+endpoint.ID+`","timeout":"30s","rewrite":true,"fallback":"deny"}`); status != http.StatusOK {
		t.Fatalf("set: %d %s", status, set)
	}
	b := open("b") // and knows the setting when it starts
	position := func(p *Process, id string, want int) string {
		t.Helper()
		status, text := call(t, p, "POST", events, token, `{"id":"`+id+`","type":"message.sent","sender":"ann","recipient":"ben","data":{"bodies":[{"type":"txt","msg":"rude"}]}}`)
		var v struct{ Position string }
		if err := json.Unmarshal([]byte(text), &v); err != nil || status != want {
			t.Fatalf("%s: %d %s", id, status, text)
		}
		return v.Position
	}
	// seen waits for an event in a process's view.
	seen := func(p *Process, id, at, text string) {
		t.Helper()
		if status, got := call(t, p, "GET", events+"/"+id+"?min_position="+at, token, ""); status != http.StatusOK || !strings.Contains(got, `"msg":"`+text+`"`) {
			t.Fatalf("%s: %d %s", id, status, got)
		}
	}

	// What one has stored, the other takes when its view has it.
	answers(func(_ string, n int) string {
		return `{"decision":"rewrite","text":"kind ` + strings.Repeat("i", n) + `"}`
	})
	at := position(a, "one", http.StatusCreated)
	seen(b, "one", at, "kind i")
	if again := position(b, "one", http.StatusOK); again != at || times("one") != 1 {
		t.Errorf("at %s and %s, asked %d times", at, again, times("one"))
	}

	// While the second asks, the first asks too, gets another answer, and stores it.
	for i, first := range []string{`{"decision":"rewrite","text":"kind"}`, `{"decision":"allow"}`} {
		for k, second := range []string{`{"decision":"rewrite","text":"kinder"}`, `{"decision":"allow"}`} {
			id := fmt.Sprintf("both-%d%d", i, k)
			asking, release := make(chan struct{}), make(chan struct{})
			answers(func(_ string, n int) string {
				if n == 1 {
					close(asking)
					<-release
					return second
				}
				return first
			})
			done, end := make(chan string, 1), sync.OnceFunc(func() { close(release) })
			defer end() // before the judge is closed, which waits for its answers
			go func() {
				defer close(done) // position may end this goroutine
				done <- position(b, id, http.StatusOK)
			}()
			<-asking
			at := position(a, id, http.StatusCreated)
			text := "rude"
			if strings.Contains(first, "kind") {
				text = "kind"
			}
			seen(b, id, at, text)
			end()
			if again := <-done; again != at {
				t.Errorf("%s, %s: at %s and %s", first, second, at, again)
			}
			seen(a, id, at, text)
			if n := times(id); n != 2 {
				t.Errorf("asked %d times", n)
			}
		}
	}

	// A refusal is one process's: the other asks for itself.
	answers(func(_ string, n int) string {
		if n == 1 {
			return `{"decision":"deny"}`
		}
		return `{"decision":"allow"}`
	})
	position(a, "refused", http.StatusForbidden)
	position(a, "refused", http.StatusForbidden) // remembered
	position(b, "refused", http.StatusCreated)
	if n := times("refused"); n != 2 {
		t.Errorf("asked %d times about what was refused", n)
	}
}
