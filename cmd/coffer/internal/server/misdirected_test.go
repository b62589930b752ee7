package server_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/server"
)

// TestMisdirected asks every route that is about an app, at both listeners, for the
// app of each other region: whoever asks is told where it lives, before anything else
// of the request is looked at, and nothing is done.
func TestMisdirected(t *testing.T) {
	s := compatSite(t)
	compatHost, _ := s.compat()
	asked := 0
	for region, place := range s.regions {
		if region == "eu" {
			continue
		}
		app, stranger := place["COFFER_APP"], place["COFFER_APP"][:2]+strings.Repeat("0", 30)
		for _, row := range server.Table() {
			if !strings.Contains(row.Path, "{app}") {
				continue
			}
			tokens := map[string]string{"nobody": "-", "its backend": place["COFFER_TOKEN"], "another's backend": s.token, "a stranger": "nonsense"}
			if row.Operator {
				tokens = map[string]string{"an operator": s.operator} // who else calls has no business there
			}
			bodies := []string{"", "{}", "\x00"} // below an app's path none of them is read
			if row.Operator {
				bodies = []string{map[bool]string{true: `{"plan":"pro"}`}[row.Body]}
			}
			methods := []string{row.Method}
			if row.Method == http.MethodGet {
				methods = append(methods, http.MethodHead)
			}
			for who, token := range tokens {
				for _, id := range []string{app, stranger} {
					for _, method := range methods {
						for _, body := range bodies {
							a := s.do(request{method: method, path: fill(row.Path, id), token: token, body: body})
							asked++
							if a.status != http.StatusMisdirectedRequest {
								t.Fatalf("%s %s of %s by %s: %d %s", method, row.Path, region, who, a.status, a.body)
							}
							if method == http.MethodHead {
								continue
							}
							if v := a.json(t); a.code(t) != "wrong-region" || v["region"] != region || v["url"] != place["COFFER_URL"] || v["retryable"] != false {
								t.Fatalf("%s %s of %s by %s: %s", method, row.Path, region, who, a.body)
							}
						}
					}
				}
			}
		}
		// The routes that name an app elsewhere than in their path.
		for _, r := range []request{
			{path: "/v1/admin/keys/inventory?app=" + app},
			{path: "/v1/admin/deletions/" + app},
			{method: "POST", path: "/v1/admin/keys/jobs", body: `{"kind":"rewrap","app":"` + app + `"}`},
			{method: "POST", path: "/v1/admin/keys/shred", body: `{"app":"` + app + `"}`},
			{method: "POST", path: "/v1/admin/keys/shred", body: `{"app":"` + app + `","user":"ann"}`},
		} {
			r.token = s.operator
			a := s.do(r)
			if a.status != http.StatusMisdirectedRequest || a.json(t)["region"] != region || a.json(t)["url"] != place["COFFER_URL"] {
				t.Errorf("%s %s of %s: %d %s", r.method, r.path, region, a.status, a.body)
			}
		}
		// The other listener says it in its own form, and names that of the region.
		there := ""
		for _, r := range s.process.Regions {
			if r.ID == region {
				there = r.Compat[:strings.Index(r.Compat, "/dev/")]
			}
		}
		for _, row := range server.CompatTable() {
			for who, token := range map[string]string{"nobody": "-", "its backend": place["COFFER_TOKEN"], "another's backend": s.token} {
				path := strings.NewReplacer("{org}", "dev", "{app}", app, "{hour}", "2026010203", "{user}", "ann").Replace(row.Path)
				a := s.do(request{url: compatHost, method: row.Method, path: path, token: token})
				asked++
				v := a.json(t)
				text, _ := v["error_description"].(string)
				if a.status != http.StatusMisdirectedRequest || v["error"] != "service_resource_not_found" ||
					!strings.Contains(text, "region "+region) || there == "" || !strings.Contains(text, there) {
					t.Fatalf("%s %s of %s by %s: %d %s; want its listener %s", row.Method, row.Path, region, who, a.status, a.body, there)
				}
			}
		}
		// Nothing was done to it.
		shown := s.do(request{url: place["COFFER_URL"], path: "/v1/admin/apps/" + app, token: s.operator})
		if v := shown.json(t); shown.status != http.StatusOK || v["disabled"] == true {
			t.Errorf("the app of %s afterwards: %d %s", region, shown.status, shown.body)
		}
	}
	// One of no region at all lives nowhere.
	if a := s.do(request{path: "/v1/apps/7f" + s.app[2:] + "/events"}); a.status != http.StatusNotFound {
		t.Errorf("an app of no region: %d %s", a.status, a.body)
	}
	if asked < 500 {
		t.Errorf("only %d requests", asked)
	}
	t.Logf("%d requests", asked)
}
