package server_test

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/erasures"
)

func (s *site) exchange(method, path, token, body string, want int, into any) {
	s.t.Helper()
	r := request{method: method, path: path, token: token, body: body}
	got := s.do(r)
	if got.status != want {
		s.t.Fatalf("%s %s: %d %s, want %d", method, path, got.status, got.body, want)
	}
	if into == nil {
		return
	}
	if err := json.Unmarshal(got.body, into); err != nil {
		s.t.Fatal(err)
	}
}

// await replays until there are so many events: the view follows the journal.
func (s *site) await(query string, many int) []map[string]any {
	s.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		events, _ := s.replay(query)
		if len(events) >= many {
			return events
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s gives %d events, want %d", query, len(events), many)
		}
	}
}

// TestErasures: by the app's backend, with a receipt that the published key
// verifies; the user is told to be erased by every route, until it is registered
// again.
func TestErasures(t *testing.T) {
	s := newSite(t, config.Limits{})
	before := s.post(sent("m1", "ann", "ben", "secret"), sent("m2", "ben", "ann", "kept"))
	base := "/v1/apps/" + s.app
	var e erasures.Erasure
	s.exchange("POST", base+"/erasures", s.token, `{"user":"ann"}`, http.StatusAccepted, &e)
	s.exchange("GET", base+"/erasures/"+e.ID, s.token, "", http.StatusOK, &e)
	if e.State != erasures.Done {
		t.Fatalf("%+v", e)
	}
	var keys jose.JSONWebKeySet
	s.exchange("GET", "/v1/region/keys", "", "", http.StatusOK, &keys)
	signed, err := jose.ParseSignedCompact(e.Receipt, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		t.Fatal(err)
	}
	if keys.Keys[0].KeyID != signed.Signatures[0].Header.KeyID {
		t.Error("the receipt names another key")
	}
	payload, err := signed.Verify(keys.Keys[0])
	if err != nil {
		t.Fatal(err)
	}
	var receipt erasures.Receipt
	if err := json.Unmarshal(payload, &receipt); err != nil || receipt.App != s.app || receipt.Erasure != e.ID {
		t.Errorf("%s: %v", payload, err)
	}
	s.exchange("GET", base+"/events/m1?min_position="+before[1], s.token, "", http.StatusGone, nil)
	s.exchange("GET", base+"/events/m2", s.token, "", http.StatusOK, nil)
	s.exchange("POST", base+"/events", s.token, sent("m3", "ann", "ben", "x"), http.StatusConflict, nil)
	events := s.await("?type=user.erased", 1)
	if len(events) != 1 || events[0]["recipient"] != "ann" {
		t.Errorf("who replays is told %v", events)
	}
	s.exchange("POST", base+"/users/ann/registrations", s.token, "", http.StatusOK, nil)
	positions := s.post(sent("m4", "ann", "ben", "x"))
	s.exchange("GET", base+"/events/m4?min_position="+positions[0], s.token, "", http.StatusOK, nil)
	s.exchange("GET", base+"/events/m1", s.token, "", http.StatusGone, nil)

	for _, refused := range []struct {
		method, path, token, body string
		want                      int
	}{
		{"POST", base + "/erasures", s.userToken("ann"), `{"user":"ann"}`, 403},
		{"POST", base + "/erasures", s.operator, `{"user":"ann"}`, 403},
		{"POST", base + "/erasures", s.token, `{"user":"a b"}`, 400},
		{"POST", base + "/erasures", s.token, `{}`, 400},
		{"GET", base + "/erasures/" + e.Subject + "-7", s.token, "", 404},
		{"GET", base + "/erasures/x", s.token, "", 404},
		{"POST", base + "/users/a%20b/registrations", s.token, "", 400},
		{"GET", "/v1/admin/erasures", s.token, "", 403},
		{"POST", "/v1/admin/erasures", s.token, `{"receipts":[]}`, 403},
		{"POST", "/v1/admin/erasures", s.operator, `{"receipts":["x"]}`, 400},
	} {
		s.exchange(refused.method, refused.path, refused.token, refused.body, refused.want, nil)
	}
	body, err := json.Marshal(map[string][]string{"receipts": {e.Receipt}})
	if err != nil {
		t.Fatal(err)
	}
	s.exchange("POST", "/v1/admin/erasures", s.operator, string(body), http.StatusOK, nil)
	s.exchange("GET", base+"/events/m4", s.token, "", http.StatusOK, nil) // registered after that erasure
}
