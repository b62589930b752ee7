package server

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
	"github.com/cofferdb/coffer/projections/pebble"
)

// TestChangedBeforeReading: a tail asks to be woken before it reads. Whenever it
// asks, an event is committed first, so a tail that asked after its reading would
// sleep with an event unread.
func TestChangedBeforeReading(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // bounds a tail that sleeps
	defer cancel()
	s, app := newInner(t)
	add := func(id string) {
		told := s.runner.Changed(app.ID)
		results, err := s.journal.Append(ctx, app.ID, journal.Event{
			ID: id, Type: journal.MessageSent, Conversation: "group", ConversationType: journal.Group, Sender: "ann",
			Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"x"}]}`),
		})
		if err == nil && len(results) == 1 {
			err = results[0].Err
		}
		if err == nil {
			select {
			case <-told: // it is in the view, and who waited has been woken
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		if err != nil {
			t.Errorf("append %s: %v", id, err)
		}
	}
	const rounds = 10
	asked := 0 // by the tail's goroutine only
	s.changed = func(id journal.AppID) <-chan struct{} {
		if asked < rounds {
			add(fmt.Sprint("asked-", asked))
		}
		asked++
		return s.runner.Changed(id)
	}
	web := httptest.NewServer(s)
	defer web.Close()
	token, err := auth.Build(auth.Spec{AppID: app.ID.String(), Certificate: app.Certificates[0].Reveal(), Issued: time.Now(), Lifetime: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, web.URL+"/v1/apps/"+app.ID.String()+"/events?follow=true", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", typeNDJSON)
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	expect := func(id string) {
		t.Helper()
		if !lines.Scan() {
			t.Fatalf("the tail ended before %s: %v", id, lines.Err())
		}
		var e struct {
			ID string `json:"id"`
		}
		if err := json.Unmarshal([]byte(strings.TrimLeft(lines.Text(), " ")), &e); err != nil || e.ID != id {
			t.Fatalf("got %s, %v; want %s", lines.Text(), err, id)
		}
	}
	for i := range rounds {
		expect(fmt.Sprint("asked-", i))
		add(fmt.Sprint("woken-", i))
		expect(fmt.Sprint("woken-", i))
	}
}

// newInner makes a server with a journal and a view of its own, without a
// listener.
func newInner(t *testing.T) (*Server, journal.App) {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	broker, conn := journaltest.Start(t, embedded.Options{StoreDir: filepath.Join(dir, "nats")})
	provider, err := local.Open(t.Context(), local.Options{Path: filepath.Join(dir, "key.json"), Create: true})
	must(err)
	t.Cleanup(func() { _ = provider.Close() })
	store, err := pebble.Open(pebble.Options{Dir: filepath.Join(dir, "views")})
	must(err)
	t.Cleanup(func() { _ = store.Close() })
	view, err := history.New(history.Config{Store: store})
	must(err)
	cfg := journal.Config{Region: journal.DefaultRegions()[2], Conn: conn, KMS: provider, Index: view}
	if s := broker.Syncer(); s != nil {
		cfg.Sync = s
	}
	j, err := journal.Open(t.Context(), cfg)
	must(err)
	t.Cleanup(func() { _ = j.Close() })
	runner, err := projections.NewRunner(projections.RunnerConfig{Journal: j, Store: store, Projections: []projections.Projection{view}})
	must(err)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- runner.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	app, err := j.CreateApp(t.Context(), journal.AppSpec{Name: "test", Plan: "enterprise"})
	must(err)
	return New(Options{Region: cfg.Region, Journal: j, History: view, Runner: runner}), app
}
