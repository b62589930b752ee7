package server_test

import (
	"bytes"
	"net/http"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/journal"
)

// TestReservedIDs: whatever the server writes on behalf of a request has an id that
// no caller can have given before.
func TestReservedIDs(t *testing.T) {
	s := newSite(t, config.Limits{})
	at := s.post(sent("m1", "ann", "ben", "hi"))
	if response, body := s.attach("PUT", "pic", s.token, bytes.NewReader([]byte("x")), png()); response.StatusCode != http.StatusCreated {
		t.Fatalf("attachment: %d %s", response.StatusCode, body)
	}
	app := "/v1/apps/" + s.app
	s.replay("?min_position=" + at[0])
	if a := s.do(request{method: "POST", path: app + "/users/ben/inbox/ack", body: `{"through":"` + at[0] + `"}`}); a.status/100 != 2 {
		t.Fatalf("acknowledgement: %d %s", a.status, a.body)
	}
	if a := s.do(request{method: "POST", path: app + "/erasures", body: `{"user":"ann"}`}); a.status/100 != 2 {
		t.Fatalf("erasure: %d %s", a.status, a.body)
	}
	seen := make(map[journal.Type]bool)
	for _, event := range s.await("?type=attachment.stored,inbox.acked,user.erased", 3) {
		kind, err := journal.ParseType(event["type"].(string)) //nolint:errcheck,forcetypeassert // the test ends
		if err != nil || !kind.Reserved() {
			t.Errorf("%v", event)
		}
		if id, ok := event["id"].(string); !ok || !journal.ReservedID(id) {
			t.Errorf("a caller could have taken the id of %v", event)
		}
		seen[kind] = true
	}
	if len(seen) != 3 {
		t.Errorf("seen %v", seen)
	}
}
