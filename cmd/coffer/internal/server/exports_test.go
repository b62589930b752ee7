package server_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/journal"
)

func (s *site) exports() string { return "/v1/apps/" + s.app + "/exports" }

// export makes an export and returns its path and its manifest.
func (s *site) export(body, position string) (string, map[string]any) {
	s.t.Helper()
	a := s.do(request{method: "POST", path: s.exports() + "?min_position=" + position, body: body})
	if a.status != http.StatusAccepted {
		s.t.Fatalf("%s: %d %s", body, a.status, a.body)
	}
	path := a.header.Get("Location")
	s.finished(path)
	m := s.do(request{path: path + "/manifest"})
	if m.status != http.StatusOK {
		s.t.Fatalf("manifest: %d %s", m.status, m.body)
	}
	return path, m.json(s.t)
}

func (s *site) finished(path string) map[string]any {
	s.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		job := s.do(request{path: path}).json(s.t)
		if job["state"] == "done" {
			return job
		}
		if job["state"] != "running" || time.Now().After(end) {
			s.t.Fatalf("the export did not end: %v\n%s", job, s.log)
		}
	}
}

// file fetches a file and returns its lines as bytes.
func (s *site) file(path, name string) []byte {
	s.t.Helper()
	a := s.do(request{path: path + "/files/" + name})
	if a.status != http.StatusOK {
		s.t.Fatalf("file %s: %d %s", name, a.status, a.body)
	}
	if !strings.HasSuffix(name, ".gz") {
		return a.body
	}
	r, err := gzip.NewReader(bytes.NewReader(a.body))
	if err != nil {
		s.t.Fatal(err)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		s.t.Fatal(err)
	}
	return text
}

func files(m map[string]any) []map[string]any {
	var list []map[string]any
	for _, f := range m["files"].([]any) {
		list = append(list, f.(map[string]any))
	}
	return list
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func sentAt(id, from, to string, at time.Time) string {
	return fmt.Sprintf(`{"id":%q,"type":"message.sent","time":%q,"sender":%q,"recipient":%q,"data":{"bodies":[{"type":"txt","msg":%q}]}}`,
		id, at.UTC().Format(time.RFC3339Nano), from, to, "text of "+id)
}

func TestExportOfLinesIsTheReplay(t *testing.T) {
	s := newSite(t, config.Limits{})
	at := s.post(sent("e1", "ann", "ben", "hello"), sent("e2", "cid", "dan", "hush"), sent("e3", "ann", "ben", "bye"))
	path, m := s.export(`{"format":"ndjson"}`, at[2])
	s.post(sent("later", "ann", "ben", "not in the range"))

	replayed := s.do(request{path: s.events(), header: map[string]string{"Accept": "application/x-ndjson"}}).body
	lines := bytes.SplitAfter(replayed, []byte("\n"))
	want := bytes.Join(lines[:3], nil)
	got := s.file(path, "events-000001.ndjson")
	if !bytes.Equal(got, want) {
		t.Errorf("the file is\n%s\nthe replay\n%s", got, want)
	}
	f := files(m)
	if len(f) != 1 || f[0]["sha256"] != digest(got) || f[0]["bytes"] != float64(len(got)) || f[0]["events"] != 3.0 {
		t.Errorf("manifest %v", m)
	}
	if m["through"] != at[2] || m["events"] != 3.0 || m["version"] != 1.0 || len(m["log"].(string)) != 32 || m["region"] != "eu" || m["app"] != s.app {
		t.Errorf("manifest %v", m)
	}
	if m["sha256"] != digest([]byte(digest(got)+"  events-000001.ndjson\n")) {
		t.Errorf("the manifest's digest is %v", m["sha256"])
	}

	// The same range gives the same digest, also after more was written.
	again := s.file(path, "events-000001.ndjson")
	if digest(again) != f[0]["sha256"] {
		t.Error("the second fetch differs")
	}
	for _, c := range []struct{ body, want string }{
		{`{"format":"ndjson","user":"cid"}`, "e2"},
		{`{"format":"ndjson","conversation":"ann,ben"}`, "e1 e3 later"},
		{`{"format":"ndjson","types":["receipt.read"]}`, ""},
		{`{"format":"ndjson","from":"2000-01-01T00:00:00Z","until":"2000-01-02T00:00:00Z"}`, ""},
	} {
		path, m := s.export(c.body, at[2])
		var ids []string
		for _, f := range files(m) {
			for line := range strings.Lines(string(s.file(path, f["name"].(string)))) {
				e, err := journal.ParseReplayed([]byte(strings.TrimSpace(line)))
				if err != nil {
					t.Fatal(err)
				}
				ids = append(ids, e.ID)
			}
		}
		if strings.Join(ids, " ") != c.want {
			t.Errorf("%s: %v, want %s", c.body, ids, c.want)
		}
	}
}

func TestExportOfHours(t *testing.T) {
	s := newSite(t, config.Limits{})
	now := s.now().UTC().Truncate(time.Hour)
	at := s.post(
		sentAt("h2", "ann", "ben", now.Add(-2*time.Hour).Add(time.Minute)),
		sentAt("h50", "ann", "ben", now.Add(-50*time.Hour)),
		sentAt("h2b", "ben", "ann", now.Add(-time.Hour).Add(-time.Millisecond)),
		`{"id":"r","type":"receipt.read","time":"`+now.Add(-time.Hour).Format(time.RFC3339)+`","sender":"ben","recipient":"ann","target":"h2"}`,
	)
	path, m := s.export(`{"format":"agora"}`, at[3])
	var got []string
	for _, f := range files(m) {
		text := s.file(path, f["name"].(string))
		if digest(text) != f["sha256"] {
			t.Errorf("%v: digest %s", f, digest(text))
		}
		got = append(got, f["name"].(string)+":")
		for line := range strings.Lines(string(text)) {
			e, err := agora.Parse([]byte(strings.TrimSpace(line)))
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e.ID)
		}
	}
	name := func(h int) string { return now.Add(-time.Duration(h)*time.Hour).Format("2006010215") + ".gz:" }
	if want := name(50) + " h50 " + name(2) + " h2 h2b " + name(1) + " r"; strings.Join(got, " ") != want {
		t.Errorf("got  %s\nwant %s", strings.Join(got, " "), want)
	}
	if m["events"] != 4.0 || m["first"] != now.Add(-50*time.Hour).Format(time.RFC3339) {
		t.Errorf("manifest %v", m)
	}
	s.export(`{"format":"agora","from":"`+now.Add(-3*time.Hour).Format(time.RFC3339)+`","until":"`+now.Format(time.RFC3339)+`"}`, at[3])
}

// TestExportLosesWhatIsRecalled holds that what is gone is in no file that is
// fetched afterwards, and that the manifest says so.
func TestExportLosesWhatIsRecalled(t *testing.T) {
	s := newSite(t, config.Limits{})
	at := s.post(sent("e1", "ann", "ben", "a secret"), sent("e2", "ann", "ben", "stays"))
	path, m := s.export(`{"format":"ndjson"}`, at[1])
	before := files(m)[0]
	recall := s.post(`{"id":"x","type":"message.recalled","sender":"ann","recipient":"ben","target":"e1"}`)
	s.replay("?min_position=" + recall[0])
	text := s.file(path, "events-000001.ndjson")
	if bytes.Contains(text, []byte("a secret")) || !bytes.Contains(text, []byte("stays")) {
		t.Errorf("the file is %s", text)
	}
	after := files(s.do(request{path: path + "/manifest"}).json(t))[0]
	if after["sha256"] == before["sha256"] || after["sha256"] != digest(text) || after["omitted"] != 1.0 || after["events"] != 1.0 || after["changed"] == nil {
		t.Errorf("the entry was %v, is %v", before, after)
	}
}

func TestExportRequests(t *testing.T) {
	s := newSite(t, config.Limits{})
	at := s.post(sent("e1", "ann", "ben", "hello"))
	for name, body := range map[string]string{
		"no format":        `{}`,
		"another format":   `{"format":"csv"}`,
		"unknown member":   `{"format":"ndjson","x":1}`,
		"bad user":         `{"format":"ndjson","user":"a b"}`,
		"bad conversation": `{"format":"ndjson","conversation":"../x"}`,
		"bad type":         `{"format":"ndjson","types":["message.lost"]}`,
		"bad time":         `{"format":"ndjson","from":"yesterday"}`,
		"empty time":       `{"format":"ndjson","from":"2026-01-02T00:00:00Z","until":"2026-01-02T00:00:00Z"}`,
		"an array":         `[]`,
		"twice":            `{"format":"ndjson","format":"agora"}`,
		"NUL":              `{"format":"ndjson","user":"a\u0000"}`,
	} {
		a := s.do(request{method: "POST", path: s.exports(), body: body})
		if a.status != http.StatusBadRequest || a.code(t) != "invalid-request" {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	path, _ := s.export(`{"format":"ndjson"}`, at[0])
	for _, p := range []string{
		s.exports() + "/0000000000000000", s.exports() + "/x", s.exports() + "/" + strings.Repeat("A", 16), path + "/files/events-000002.ndjson",
		path + "/files/..", path + "/files/2026010203.gz", s.exports() + "/0000000000000000/manifest",
	} {
		if a := s.do(request{path: p}); a.status != http.StatusNotFound || a.code(t) != "not-found" {
			t.Errorf("%s: %d %s", p, a.status, a.body)
		}
	}

	// An export is its app's.
	created := s.do(request{method: "POST", path: "/v1/admin/apps", token: s.operator, body: `{"name":"other","plan":"free"}`}).json(t)
	other := s.tokenOf(created["id"].(string), created["certificates"].([]any)[0].(string))
	id := path[strings.LastIndex(path, "/"):]
	if a := s.do(request{path: "/v1/apps/" + created["id"].(string) + "/exports" + id, token: other}); a.status != http.StatusNotFound {
		t.Errorf("another app's: %d %s", a.status, a.body)
	}

	// A key makes a second request the same.
	key := map[string]string{"Idempotency-Key": "k1"}
	first := s.do(request{method: "POST", path: s.exports(), body: `{"format":"ndjson","user":"ann"}`, header: key})
	second := s.do(request{method: "POST", path: s.exports(), body: `{"format":"ndjson","user":"ann"}`, header: key})
	third := s.do(request{method: "POST", path: s.exports(), body: `{"format":"ndjson","user":"ben"}`, header: key})
	if first.status != 202 || second.status != 200 || first.json(t)["id"] != second.json(t)["id"] || third.code(t) != "idempotency-conflict" {
		t.Errorf("with a key: %d, %d %s, %d %s", first.status, second.status, second.body, third.status, third.body)
	}

	var all struct{ Data []struct{ ID string } }
	for range 40 {
		a := s.do(request{method: "POST", path: s.exports(), body: `{"format":"ndjson"}`})
		if a.status == http.StatusConflict {
			if a.code(t) != "exports-full" {
				t.Errorf("full: %s", a.body)
			}
			break
		}
	}
	if err := json.Unmarshal(s.do(request{path: s.exports()}).body, &all); err != nil || len(all.Data) != 32 {
		t.Fatalf("%d exports, %v", len(all.Data), err)
	}
	for _, e := range all.Data {
		if a := s.do(request{method: "DELETE", path: s.exports() + "/" + e.ID}); a.status != http.StatusNoContent || len(a.body) != 0 {
			t.Errorf("delete: %d %s", a.status, a.body)
		}
	}
	if a := s.do(request{method: "DELETE", path: path}); a.status != http.StatusNotFound {
		t.Errorf("second delete: %d", a.status)
	}
	if err := json.Unmarshal(s.do(request{path: s.exports()}).body, &all); err != nil || len(all.Data) != 0 {
		t.Errorf("%d exports are left, %v", len(all.Data), err)
	}
}

// TestExportSurvivesARestart: what was asked for before is made, and fetched,
// after it, and goes by itself.
func TestExportSurvivesARestart(t *testing.T) {
	s := newSite(t, config.Limits{})
	at := s.post(sent("e1", "ann", "ben", "hello"))
	done, m := s.export(`{"format":"ndjson","user":"ann"}`, at[0])
	a := s.do(request{method: "POST", path: s.exports(), body: `{"format":"agora"}`})
	path := a.header.Get("Location")
	s.stop()
	s.start()
	s.finished(path)
	if got := s.file(done, "events-000001.ndjson"); digest(got) != files(m)[0]["sha256"] {
		t.Errorf("after a restart the file is %s", got)
	}
	s.setClock(8 * 24 * time.Hour)
	for end := time.Now().Add(time.Minute); s.do(request{path: path, token: s.appToken()}).status != http.StatusNotFound; time.Sleep(20 * time.Millisecond) {
		s.do(request{method: "POST", path: s.exports(), token: s.appToken(), body: `{"format":"ndjson"}`, header: map[string]string{"Idempotency-Key": "wakes"}})
		if time.Now().After(end) {
			t.Fatal("an export outlives its time")
		}
	}
	s.setClock(0)
}
