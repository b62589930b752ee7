package server_test

import (
	"fmt"
	"net/http"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

func sent(id, sender, recipient, text string) string {
	return fmt.Sprintf(`{"id":%q,"type":"message.sent","sender":%q,"recipient":%q,"data":{"bodies":[{"type":"txt","msg":%q}]}}`, id, sender, recipient, text)
}

func TestAppendAndReplay(t *testing.T) {
	s := newSite(t, config.Limits{})
	one := s.do(request{method: "POST", path: s.events(), body: sent("e1", "ann", "ben", "hello")})
	if one.status != http.StatusCreated {
		t.Fatalf("append: %d %s", one.status, one.body)
	}
	first := one.json(t)
	again := s.do(request{method: "POST", path: s.events(), body: sent("e1", "ann", "ben", "hello")})
	if again.status != http.StatusOK || again.json(t)["position"] != first["position"] {
		t.Errorf("again: %d %s, first %s", again.status, again.body, one.body)
	}
	s.post(sent("e2", "ben", "ann", "hi"), sent("e3", "ann", "ben", "so"))
	last := s.post(sent("e4", "cid", "ann", "?"))
	events, end := s.replay("?min_position=" + last[0])
	if got := fmt.Sprint(ids(events)); got != "[e1 e2 e3 e4]" {
		t.Errorf("replay gave %s", got)
	}
	t.Log(end)
}
