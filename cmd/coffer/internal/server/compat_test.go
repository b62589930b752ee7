package server_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/cmd/coffer/internal/server"
)

// compatSite is a site with compatibility listeners.
func compatSite(t *testing.T) *site {
	t.Helper()
	return newSiteWith(t, node.DevOptions{Limits: config.Limits{}, Compat: true})
}

// compat is where the paths of eu's app begin, host and path apart.
func (s *site) compat() (host, base string) {
	s.t.Helper()
	for _, r := range s.process.Regions {
		if r.ID == "eu" {
			i := strings.Index(r.Compat, "/dev/")
			return r.Compat[:i], r.Compat[i:]
		}
	}
	s.t.Fatal("no region eu")
	return "", ""
}

// ask calls the compatibility listener and returns data, or the error's name.
func (s *site) ask(method, path, token, body string) (any, string, answer) {
	s.t.Helper()
	host, base := s.compat()
	a := s.do(request{url: host, method: method, path: base + path, token: token, body: body})
	v := a.json(s.t)
	if a.status == http.StatusOK {
		for _, member := range []string{"action", "application", "applicationName", "organization", "path", "uri", "data", "timestamp", "duration"} {
			if v[member] == nil {
				s.t.Errorf("%s: the answer has no %s: %s", path, member, a.body)
			}
		}
		return v["data"], "", a
	}
	for _, member := range []string{"error", "exception", "timestamp", "duration", "error_description"} {
		if v[member] == nil {
			s.t.Errorf("%s: the error has no %s: %s", path, member, a.body)
		}
	}
	if len(v) != 5 {
		s.t.Errorf("%s: the error is %s", path, a.body)
	}
	name, _ := v["error"].(string)
	return nil, name, a
}

// TestCompatCallers walks the compatibility listener's table with every kind of
// caller.
func TestCompatCallers(t *testing.T) {
	s := compatSite(t)
	host, base := s.compat()
	callers := map[string]string{
		"nobody": "-", "app": s.token, "user": s.userToken("ann"), "operator": s.operator,
		"another region's app": s.regions["us"]["COFFER_TOKEN"], "a stranger": "nonsense",
	}
	rows := server.CompatTable()
	if len(rows) < 6 {
		t.Fatalf("%d routes", len(rows))
	}
	fill := strings.NewReplacer("/{org}/{app}", base, "{hour}", s.now().UTC().Add(-2*time.Hour).Format("2006010215"), "{user}", "ann")
	for _, row := range rows {
		for who, token := range callers {
			r := request{url: host, method: row.Method, path: fill.Replace(row.Path), token: token}
			if row.Body {
				r.body = `{"to":"ben","groupId":"g"}`
			}
			a := s.do(r)
			refused := a.status == http.StatusUnauthorized || a.status == http.StatusForbidden
			if allowed := row.App && who == "app"; allowed == refused {
				t.Errorf("%s %s by %s: %d %s", row.Method, row.Path, who, a.status, a.body)
			}
		}
	}
	for path, status := range map[string]int{
		"/other/" + s.app + "/chatmessages/2026010203":               404,
		"/dev/" + s.regions["us"]["COFFER_APP"] + "/chatmessages/26": 421,
		"/dev/shop/chatmessages/2026010203":                          404,
		base + "/chatmessages":                                       404,
		base + "/messages/recall":                                    405,
		"/v1/apps/" + s.app + "/events":                              404,
	} {
		if a := s.do(request{url: host, path: path}); a.status != status {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
}

func TestCompatHours(t *testing.T) {
	s := compatSite(t)
	now := s.now().UTC().Truncate(time.Hour)
	at := s.post(
		sentAt("h3", "ann", "ben.c", now.Add(-3*time.Hour).Add(time.Minute)),
		sentAt("h3b", "ben.c", "ann", now.Add(-2*time.Hour).Add(-time.Millisecond)),
		sentAt("h2", "ann", "ben.c", now.Add(-2*time.Hour)),
	)
	s.replay("?min_position=" + at[2])
	data, _, _ := s.ask("GET", "/chatmessages/"+now.Add(-3*time.Hour).Format("2006010215"), "", "")
	link := data.([]any)[0].(map[string]any)["url"].(string)
	host, _ := s.compat()
	fetch := func(link string) answer {
		return s.do(request{url: host, path: strings.TrimPrefix(link, host), token: "-"})
	}
	a := fetch(link)
	r, err := gzip.NewReader(bytes.NewReader(a.body))
	if err != nil {
		t.Fatalf("%d %q: %v", a.status, a.body, err)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(text)) {
		var v struct {
			ID string `json:"msg_id"`
			To string `json:"to"`
		}
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatal(err)
		}
		got = append(got, v.ID+">"+v.To)
	}
	if strings.Join(got, " ") != "h3>ben.c h3b>ann" {
		t.Errorf("the file has %v", got)
	}

	// The link is of this hour, and for a while.
	for name, changed := range map[string]string{
		"another hour": strings.Replace(link, now.Add(-3*time.Hour).Format("2006010215"), now.Add(-2*time.Hour).Format("2006010215"), 1),
		"longer":       strings.Replace(link, "expires=", "expires=9", 1),
		"cut":          link[:len(link)-2],
		"no signature": link[:strings.Index(link, "?")],
	} {
		if a := fetch(changed); a.status != http.StatusUnauthorized {
			t.Errorf("%s: %d", name, a.status)
		}
	}
	s.setClock(31 * time.Minute)
	if a := fetch(link); a.status != http.StatusUnauthorized {
		t.Errorf("after half an hour: %d", a.status)
	}
	s.setClock(0)
	for hour, want := range map[string]string{
		now.Format("2006010215"): "service_resource_not_found", "2001010203": "service_resource_not_found", "20260102": "illegal_argument", "2026010299": "illegal_argument",
	} {
		if _, name, a := s.ask("GET", "/chatmessages/"+hour, "", ""); name != want {
			t.Errorf("%s: %d %s", hour, a.status, a.body)
		}
	}
}

func TestCompatRecallAndRoaming(t *testing.T) {
	s := compatSite(t)
	var events []string
	for _, id := range []string{"m1", "m2", "m3", "m4", "m5"} {
		events = append(events, sent(id, "ann", "ben", "text of "+id))
	}
	events = append(events,
		`{"id":"e","type":"message.edited","sender":"ann","recipient":"ben","target":"m2","data":{"bodies":[{"type":"txt","msg":"edited"}]}}`,
		`{"id":"g1","type":"message.sent","conversation":"g","conversationtype":"group","sender":"ann","data":{"bodies":[{"type":"txt","msg":"x"}]}}`,
		sentAt("old", "ann", "ben", s.now().Add(-time.Hour)),
		sent("recall-m3", "cid", "dan", "an id that the listener gives a recall itself"))
	at := s.post(events...)
	s.replay("?min_position=" + at[len(at)-1])

	for body, want := range map[string]string{
		`{"to":"ben","chat_type":"chat","force":true}`:                            "param msg_id can't be empty",
		`{"msg_id":"m3","chat_type":"chat","force":true}`:                         "param to can't be empty",
		`{"msg_id":"m3","to":"cid","chat_type":"chat","force":true}`:              "can't find msg to",
		`{"msg_id":"g1","to":"g","chat_type":"chatroom","force":true}`:            "can't find msg to",
		`{"msg_id":"none","to":"ben","chat_type":"chat","force":true}`:            "not_found msg",
		`{"msg_id":"old","to":"ben","chat_type":"chat","force":false}`:            "exceed recall time limit",
		`{"msg_id":"m3","to":"ben","chat_type":"chat","from":"a b","force":true}`: "white space",
		`{"msg_id":"m3","to":"ben","chat_type":"party","force":true}`:             "it is chat, groupchat or chatroom",
		`{"msg_id":3}`: "JSON object",
		`{"msg_id":"coffer:plan-changed:1","to":"ben","chat_type":"chat","force":true}`: "param msg_id names no message: ids that begin with coffer:",
	} {
		if _, name, a := s.ask("POST", "/messages/msg_recall", "", body); name == "" || !strings.Contains(string(a.body), want) {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	for _, body := range []string{
		`{"msg_id":"m3","to":"ben","chat_type":"chat","from":"ann","force":false,"sync_device":true,"recallMessageExtensionInfo":"why"}`,
		`{"msg_id":"g1","to":"g","chat_type":"groupchat","force":true}`,
		`{"msg_id":"old","to":"ben","chat_type":"chat","force":true}`,
	} {
		data, name, a := s.ask("POST", "/messages/msg_recall", "", body)
		if name != "" || data.(map[string]any)["recalled"] != "yes" {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	if _, _, a := s.ask("GET", "/chatmessages/2026", "", ""); a.status != 400 {
		t.Errorf("%d", a.status)
	}
	// The view has the recalls when a new event after them is there.
	s.replay("?min_position=" + s.post(sent("later", "cid", "dan", "x"))[0])
	if _, _, a := s.ask("POST", "/messages/recall", "", `{"msg_id":"m3","to":"ben","chat_type":"chat","force":true}`); !strings.Contains(string(a.body), "not_found msg") {
		t.Errorf("again: %s", a.body)
	}

	roam := func(body string) (ids []string, cursor string, last bool) {
		data, _, a := s.ask("POST", "/rest/message/roaming/chat/user/ann", "", body)
		v, ok := data.(map[string]any)
		if !ok {
			t.Fatalf("%s: %d %s", body, a.status, a.body)
		}
		for _, m := range v["msgs"].([]any) {
			m := m.(map[string]any)
			text := m["payload"].(map[string]any)["bodies"].([]any)[0].(map[string]any)["msg"].(string)
			if edited := m["msg_id"] == "m2"; edited != (text == "edited") {
				t.Errorf("%v", m)
			}
			ids = append(ids, m["msg_id"].(string))
		}
		return ids, v["cursor"].(string), v["is_last"].(bool)
	}
	for _, c := range []struct{ order, want string }{{"down", "m5 m4 m2 m1"}, {"up", "m1 m2 m4 m5"}} {
		var all []string
		cursor := ""
		for range 10 {
			ids, next, last := roam(`{"to":"ben","limit":2,"order":"` + c.order + `","cursor":"` + cursor + `"}`)
			all = append(all, ids...)
			if cursor = next; last {
				break
			}
		}
		if strings.Join(all, " ") != c.want {
			t.Errorf("%s: %v, want %s", c.order, all, c.want)
		}
	}
	if ids, _, last := roam(`{"to":"ben","endTimestamp":1000000000000}`); len(ids) != 0 || !last {
		t.Errorf("long ago: %v", ids)
	}
	_, cursor, _ := roam(`{"to":"ben","limit":1}`)
	for _, body := range []string{
		`{}`, `{"to":"a b"}`, `{"to":"ben","limit":51}`, `{"to":"ben","order":"left"}`, `{"to":"ben","username":"cid"}`, `[]`,
		`{"to":"cid","cursor":"` + cursor + `"}`, `{"to":"ben","order":"up","cursor":"` + cursor + `"}`, `{"to":"ben","cursor":"x"}`,
		`{"to":"ben","startTimestamp":2,"endTimestamp":1}`, `{"to":"ben","startTimestamp":-1}`,
	} {
		if _, name, a := s.ask("POST", "/rest/message/roaming/chat/user/ann", "", body); name != "illegal_argument" {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
}

// TestCompatFromPython walks hour files as somebody's script would.
func TestCompatFromPython(t *testing.T) {
	python := need(t, "python3", "install Python 3")
	s := compatSite(t)
	now := s.now().UTC().Truncate(time.Hour)
	at := s.post(
		sentAt("p5", "ann", "ben", now.Add(-5*time.Hour).Add(time.Second)),
		sentAt("p2", "ben", "ann", now.Add(-2*time.Hour)),
		sentAt("p1", "ben", "ann", now.Add(-time.Millisecond)),
	)
	s.replay("?min_position=" + at[2])
	host, base := s.compat()
	cmd := exec.CommandContext(t.Context(), python, "../../../../docs/api/examples/agora_hours.py", "6")
	cmd.Env = append(os.Environ(), "COFFER_COMPAT="+host+base, "COFFER_TOKEN="+s.token, "COFFER_CA="+s.process.CAFile)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if text := string(out); !strings.Contains(text, " p5 chat ann ben\n") || !strings.Contains(text, " p1 chat ben ann\n") || !strings.HasSuffix(text, "messages: 3\n") {
		t.Errorf("it said %s", text)
	}
}
