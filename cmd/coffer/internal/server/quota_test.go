package server_test

import (
	"context"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// TestGreedyAppBesideAModestOne: an app that asks without end is told to wait,
// and one that asks now and then is always answered.
func TestGreedyAppBesideAModestOne(t *testing.T) {
	s := newSite(t, config.Limits{AppRequests: 20, AppBurst: 40, AppStreams: 3})
	created := s.do(request{method: "POST", path: "/v1/admin/apps", token: s.operator, body: `{"name":"modest","plan":"free"}`})
	if created.status != http.StatusCreated {
		t.Fatalf("creating an app: %d %s", created.status, created.body)
	}
	id := created.json(t)["id"].(string)
	modest, err := auth.Build(auth.Spec{
		AppID: id, Certificate: created.json(t)["certificates"].([]any)[0].(string), Issued: s.now(), Lifetime: time.Hour,
	})
	if err != nil {
		t.Fatal(err)
	}
	var refused, answered atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	var greedy sync.WaitGroup
	for range 8 {
		greedy.Go(func() {
			for ctx.Err() == nil {
				a := s.do(request{path: s.events() + "?limit=1"})
				switch a.status {
				case http.StatusOK:
					answered.Add(1)
				case http.StatusTooManyRequests:
					refused.Add(1)
					if n, err := strconv.Atoi(a.header.Get("Retry-After")); err != nil || n < 1 || n > 10 {
						t.Errorf("Retry-After: %q", a.header.Get("Retry-After"))
					}
					if a.code(t) != "rate-limited" {
						t.Errorf("%d %s", a.status, a.body)
					}
				default:
					t.Errorf("%d %s", a.status, a.body)
				}
			}
		})
	}
	for refused.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	for i := range 30 {
		if a := s.do(request{path: "/v1/apps/" + id + "/events", token: modest}); a.status != http.StatusOK {
			t.Errorf("modest request %d: %d %s", i, a.status, a.body)
		}
	}
	// A credential that is not the app's takes nothing from it.
	for range 50 {
		if a := s.do(request{path: "/v1/apps/" + id + "/events", token: s.token}); a.status != http.StatusUnauthorized {
			t.Fatalf("the greedy app's token: %d", a.status)
		}
	}
	if a := s.do(request{path: "/v1/apps/" + id + "/events", token: modest}); a.status != http.StatusOK {
		t.Errorf("modest at the end: %d %s", a.status, a.body)
	}
	cancel()
	greedy.Wait()
	t.Logf("greedy: %d answered, %d refused", answered.Load(), refused.Load())
}

// TestStreamsOfAnApp: streams are counted while they are open, in every form.
func TestStreamsOfAnApp(t *testing.T) {
	s := newSite(t, config.Limits{AppStreams: 3})
	s.fill(3)
	var tails []tailer
	for _, open := range tailForms() {
		tail := open(t.Context(), s, "", "")
		if _, _, ok := tail.next(); !ok {
			t.Fatal("a tail has ended")
		}
		tails = append(tails, tail)
	}
	for _, accept := range []string{"application/x-ndjson", "text/event-stream"} {
		a := s.do(request{path: s.events(), header: map[string]string{"Accept": accept}})
		if a.status != http.StatusTooManyRequests || a.code(t) != "rate-limited" || a.header.Get("Retry-After") == "" {
			t.Errorf("%s over the limit: %d %s", accept, a.status, a.body)
		}
	}
	if a := s.do(request{path: s.events()}); a.status != http.StatusOK {
		t.Errorf("a page: %d %s", a.status, a.body)
	}
	for _, tail := range tails {
		tail.close()
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		a := s.do(request{path: s.events() + "?follow=false", header: map[string]string{"Accept": "application/x-ndjson"}})
		if a.status == http.StatusOK {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("closed tails are not given back: %d %s", a.status, a.body)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestGreedyUserBesideOthers: a user that asks without end is told to wait; the
// other users of its app, and the app, notice nothing.
func TestGreedyUserBesideOthers(t *testing.T) {
	s := newSite(t, config.Limits{UserRequests: 1, UserBurst: 10, UserStreams: 2})
	s.fill(3)
	path := "/v1/apps/" + s.app + "/conversations/ann,ben/messages"
	ann, ben := s.userToken("ann"), s.userToken("ben")
	var refused atomic.Int64
	var greedy sync.WaitGroup
	for range 8 {
		greedy.Go(func() {
			for refused.Load() < 20 {
				switch a := s.do(request{path: path, token: ann}); a.status {
				case http.StatusOK:
				case http.StatusTooManyRequests:
					refused.Add(1)
					if n, err := strconv.Atoi(a.header.Get("Retry-After")); err != nil || n < 1 || n > 10 || a.code(t) != "rate-limited" {
						t.Errorf("Retry-After: %q: %s", a.header.Get("Retry-After"), a.body)
					}
				default:
					t.Errorf("%d %s", a.status, a.body)
				}
			}
		})
	}
	for refused.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	for i := range 10 {
		if a := s.do(request{path: path, token: ben}); a.status != http.StatusOK {
			t.Errorf("ben's request %d: %d %s", i, a.status, a.body)
		}
		if a := s.do(request{path: path}); a.status != http.StatusOK {
			t.Errorf("the app's request %d: %d %s", i, a.status, a.body)
		}
	}
	greedy.Wait()
}

// TestStreamsOfAUser: streams are counted for each user.
func TestStreamsOfAUser(t *testing.T) {
	s := newSite(t, config.Limits{UserStreams: 2})
	s.fill(3)
	app := s.token
	open := func(user string) tailer {
		s.token = s.userToken(user)
		defer func() { s.token = app }()
		return openEventStream(t.Context(), s, "&conversation=ann,ben", "")
	}
	tails := []tailer{open("ann"), open("ann"), open("ben")}
	a := s.do(request{path: s.events() + "?conversation=ann,ben", token: s.userToken("ann"), header: map[string]string{"Accept": "text/event-stream"}})
	if a.status != http.StatusTooManyRequests || a.code(t) != "rate-limited" || a.header.Get("Retry-After") == "" {
		t.Errorf("over the limit: %d %s", a.status, a.body)
	}
	if a := s.do(request{path: s.events() + "?limit=1&follow=false", header: map[string]string{"Accept": "text/event-stream"}}); a.status != http.StatusOK {
		t.Errorf("the app's: %d %s", a.status, a.body)
	}
	for _, tail := range tails {
		if _, _, ok := tail.next(); !ok {
			t.Error("a tail has ended")
		}
		tail.close()
	}
}
