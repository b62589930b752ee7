package server_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// TestRestart stops and starts the regions: everything acknowledged is there,
// under the same ids, positions, certificates and credentials.
func TestRestart(t *testing.T) {
	s := newSite(t, config.Limits{})
	s.fill(20)
	p := s.post(change("edit", "message.edited", "e000", "changed"))
	app, certificate, operator := s.app, s.certificate, s.operator
	want, end := s.replay("?min_position=" + p[0])
	pem, err := os.ReadFile(s.process.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		s.stop()
		if _, err := os.Stat(filepath.Join(s.options.Dir, "operator.token")); err != nil {
			t.Fatal(err)
		}
		s.start()
		if again, err := os.ReadFile(s.process.CAFile); err != nil || !bytes.Equal(pem, again) {
			t.Error("another authority")
		}
		if s.app != app || s.certificate != certificate || s.operator != operator {
			t.Error("another app, certificate or operator token")
		}
		got, _ := s.replay("")
		if len(got) != 21 || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("after a restart: %v", ids(got))
		}
		if rest, _ := s.replay("?after=" + end["next"].(string)); len(rest) != 0 {
			t.Errorf("after the old cursor: %v", ids(rest))
		}
		// The same event is still the same event.
		a := s.do(request{method: "POST", path: s.events(), body: change("edit", "message.edited", "e000", "changed")})
		if a.status != http.StatusOK || a.json(t)["position"] != want[20]["position"] {
			t.Errorf("again: %d %s", a.status, a.body)
		}
	}
}

// TestNothingReadableIsLeft looks for what only callers may know, in every file
// below the data directory and in every line that was logged, as it is and in
// the usual encodings.
func TestNothingReadableIsLeft(t *testing.T) {
	s := newSite(t, config.Limits{})
	canaries := map[string]string{
		"text": "canary-text-9f31", "user": "canary-user-7b22", "peer": "canary-peer-5c10", "conversation": "canary-conv-2d77",
		"event id": "canary-event-1e66", "app name": "canary-name-8a55", "account name": "canary-owner-3f44", "extension": "canary-ext-6e09",
	}
	event := fmt.Sprintf(`{"id":%q,"type":"message.sent","sender":%q,"recipient":%q,"data":{"bodies":[{"type":"txt","msg":%q}],"ext":{"k":%q}}}`,
		canaries["event id"], canaries["user"], canaries["peer"], canaries["text"], canaries["extension"])
	group := fmt.Sprintf(`{"type":"message.sent","sender":%q,"conversation":%q,"conversationtype":"group","data":{"bodies":[{"type":"txt","msg":%q}]}}`,
		canaries["user"], canaries["conversation"], canaries["text"])
	p := s.post(event, group)
	s.replay("?user=" + canaries["user"] + "&min_position=" + p[1])
	account := s.do(request{method: "POST", path: "/v1/admin/accounts", token: s.operator, body: `{"id":"acme","name":"` + canaries["account name"] + `"}`})
	app := s.do(request{method: "POST", path: "/v1/admin/apps", token: s.operator, body: `{"name":"` + canaries["app name"] + `","plan":"pro","account":"acme"}`})
	if account.status != 201 || app.status != 201 {
		t.Fatalf("%d %s, %d %s", account.status, account.body, app.status, app.body)
	}
	created := app.json(t)
	canaries["certificate"] = created["certificates"].([]any)[0].(string)
	canaries["user's token"] = s.userToken(canaries["user"])
	// Refused requests must not be logged with what they held, either.
	for _, r := range []request{
		{method: "POST", path: s.events(), body: strings.Replace(event, "txt", "nonsense", 1)},
		{method: "POST", path: s.events(), body: strings.Replace(event, canaries["text"], canaries["text"]+" other", 1)},
		{method: "POST", path: s.events(), body: `{"` + canaries["text"] + `":1}`},
		{method: "POST", path: s.events(), token: canaries["user's token"], body: strings.Replace(event, canaries["user"], "x", 1)},
		{path: s.events() + "/" + canaries["event id"] + "x"},
		{path: s.events() + "?user=" + canaries["user"] + "/"},
		{path: s.events() + "?" + canaries["text"] + "=1"},
		{path: "/" + canaries["text"]},
		{path: s.events(), token: canaries["user's token"]},
		{path: s.events(), token: canaries["user's token"] + "AAAA"},
		{path: "/v1/apps/" + s.app + "/conversations/" + canaries["conversation"] + "/messages"},
		{path: "/v1/admin/apps", token: s.operator},
		{path: "/v1/admin/accounts", token: s.operator},
	} {
		s.do(r)
	}
	canaries["dev certificate"], canaries["operator token"], canaries["app token"] = s.certificate, s.operator, s.token
	s.stop() // what was in memory is on disk now
	s.start()
	s.replay("")
	canaries["new token"] = s.token

	kept := map[string][]string{ // what the development set-up hands out, in files of mode 0600
		"dev.env": {"dev certificate", "operator token", "new token"}, "dev.json": {"dev certificate", "operator token", "new token"},
		"operator.token": {"operator token"},
	}
	files, found := 0, 0
	err := filepath.WalkDir(s.options.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(s.options.Dir, path)
		for what, canary := range canaries {
			if strings.Contains(name, canary) {
				t.Errorf("the name of %s tells the %s", name, what)
			}
		}
		if !d.Type().IsRegular() {
			return nil
		}
		files++
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for what, canary := range canaries {
			for form, b := range forms(canary) {
				switch {
				case !bytes.Contains(content, b):
				case slices.Contains(kept[name], what):
					found++
				default:
					t.Errorf("%s holds the %s, %s", name, what, form)
				}
			}
		}
		if secret := strings.HasSuffix(name, ".key") || strings.HasSuffix(name, "kek.json") || kept[name] != nil; secret && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o", name, info.Mode().Perm())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 20 || found != 7 {
		t.Errorf("%d files were searched, and %d of the 7 canaries that are meant to be there were found", files, found)
	}
	logged := s.log.String()
	if len(strings.Split(logged, "\n")) < 20 {
		t.Errorf("only a little was logged: %q", logged)
	}
	for what, canary := range canaries {
		for form, b := range forms(canary) {
			if strings.Contains(logged, string(b)) {
				t.Errorf("the log holds the %s, %s", what, form)
			}
		}
	}
}

func forms(canary string) map[string][]byte {
	f := map[string][]byte{
		"as it is": []byte(canary),
		"in hex":   []byte(hex.EncodeToString([]byte(canary))),
		"reversed": []byte(reverse(canary)),
	}
	if raw, err := hex.DecodeString(canary); err == nil && len(raw) == 16 {
		f["as bytes"] = raw
	}
	// Base64 has three alignments; the middle of each is looked for.
	for shift := range 3 {
		text := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", shift) + canary))
		f[fmt.Sprint("in base64, shifted by ", shift)] = []byte(text[4 : len(text)-4])
	}
	return f
}

func reverse(s string) string {
	b := []byte(s)
	slices.Reverse(b)
	return string(b)
}
