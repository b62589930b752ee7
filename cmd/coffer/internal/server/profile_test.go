package server_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

func TestProfile(t *testing.T) {
	s := newSite(t, config.Limits{})
	ann, ben := s.userToken("ann"), s.userToken("ben")
	path := func(user string) string { return "/v1/apps/" + s.app + "/users/" + user + "/profile" }
	for _, c := range []struct {
		name, method, user, token, body string
		status                          int
		want                            string
	}{
		{"none yet", "GET", "ann", ann, "", 404, "not-found"},
		{"the first", "PUT", "ann", ann, `{"nickname": "Ann", "ext": {"level": 1}}`, 201, `"profile":{"nickname":"Ann","ext":{"level":1}}`},
		{"one's own", "GET", "ann", ann, "", 200, `"user":"ann"`},
		{"the app reads", "GET", "ann", s.token, "", 200, `"nickname":"Ann"`},
		{"another user reads", "GET", "ann", ben, "", 404, "not-found"},
		{"another user writes", "PUT", "ann", ben, `{}`, 404, "not-found"},
		{"another user deletes", "DELETE", "ann", ben, "", 404, "not-found"},
		{"an operator reads", "GET", "ann", s.operator, "", 403, "privilege-missing"},
		{"the app writes", "PUT", "ann", s.token, `{"nickname":"Anna"}`, 200, `"nickname":"Anna"`},
		{"the app writes another's", "PUT", "ben", s.token, `{}`, 201, `"profile":{}`},
		{"a list", "PUT", "ann", ann, `[]`, 400, "invalid-request"},
		{"not JSON", "PUT", "ann", ann, `{`, 400, "invalid-request"},
		{"a name twice", "PUT", "ann", ann, `{"a":1,"a":2}`, 400, "invalid-request"},
		{"nothing", "PUT", "ann", ann, ``, 400, "invalid-request"},
		{"too large", "PUT", "ann", ann, `{"a":"` + strings.Repeat("x", 8<<10) + `"}`, 413, "payload-too-large"},
		{"a user's id", "GET", "a%20b", s.token, "", 400, "invalid-request"},
		{"still there", "GET", "ann", ann, "", 200, `"nickname":"Anna"`},
		{"deleted", "DELETE", "ann", ann, "", 204, ""},
		{"again", "DELETE", "ann", ann, "", 404, "not-found"},
		{"gone", "GET", "ann", s.token, "", 404, "not-found"},
		{"the other's stays", "GET", "ben", ben, "", 200, `"user":"ben"`},
	} {
		a := s.do(request{method: c.method, path: path(c.user), token: c.token, body: c.body, header: map[string]string{"Content-Type": "application/json"}})
		if a.status != c.status || !strings.Contains(string(a.body), c.want) {
			t.Errorf("%s: %d %s, want %d with %s", c.name, a.status, a.body, c.status, c.want)
		}
	}
	if a := s.do(request{method: "PUT", path: path("ann"), body: `{}`, header: map[string]string{"Content-Type": "text/plain"}}); a.status != http.StatusUnsupportedMediaType {
		t.Errorf("another type: %d %s", a.status, a.body)
	}
}
