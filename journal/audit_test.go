package journal_test

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/journal/journaltest"
	"github.com/cofferdb/coffer/kms/local"
)

// openAudited opens the journal of region eu as another process would.
func openAudited(t *testing.T, srv *embedded.Server, nc *nats.Conn, keyFile string) *journal.Journal {
	t.Helper()
	provider, err := local.Open(t.Context(), local.Options{Path: keyFile, Create: true, Region: "eu"})
	if err != nil {
		t.Fatal(err)
	}
	cfg := journal.Config{Region: journal.DefaultRegions()[2], Conn: nc, KMS: provider}
	if s := srv.Syncer(); s != nil {
		cfg.Sync = s
	}
	j, err := journal.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	return j
}

func auditLog(t *testing.T, j *journal.Journal) (records []journal.AuditRecord, err error) {
	t.Helper()
	head, err := j.AuditHead(t.Context())
	if err != nil {
		return nil, err
	}
	chain := journal.NewAuditChain(head)
	err = j.AuditLog(t.Context(), 0, func(payload []byte) error {
		r, err := chain.Add(payload)
		records = append(records, r)
		return err
	})
	if err == nil {
		err = chain.Close()
	}
	return records, err
}

func entry(target string) journal.AuditEntry {
	return journal.AuditEntry{Actor: "operator:test", Action: "key.rotate", Target: target, Outcome: "ok"}
}

// Two processes write the same log at once: one chain comes of it, with every
// entry once.
func TestAuditTwoProcesses(t *testing.T) {
	srv, nc := journaltest.Start(t, embedded.Options{})
	keyFile := t.TempDir() + "/key.json"
	journals := []*journal.Journal{openAudited(t, srv, nc, keyFile), openAudited(t, srv, nc, keyFile)}
	const each = 60
	var writers sync.WaitGroup
	for p, j := range journals {
		for i := range each {
			writers.Go(func() {
				if i%3 == 0 {
					j.AuditLater(entry(fmt.Sprint("later:", p, "-", i)))
				} else if err := j.Audit(t.Context(), entry(fmt.Sprint("now:", p, "-", i))); err != nil {
					t.Error(err)
				}
			})
		}
	}
	writers.Wait()
	// What nobody waited for is written by the time a later one is durable.
	for _, j := range journals {
		if err := j.Audit(t.Context(), entry("end")); err != nil {
			t.Fatal(err)
		}
	}
	records, err := auditLog(t, journals[0])
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, r := range records {
		seen[r.Target]++
	}
	for p := range journals {
		for i := range each {
			kind := "now:"
			if i%3 == 0 {
				kind = "later:"
			}
			if target := fmt.Sprint(kind, p, "-", i); seen[target] != 1 {
				t.Errorf("%s is there %d times", target, seen[target])
			}
		}
	}
	if len(records) != 2*each+2 || records[0].N != 1 {
		t.Errorf("%d records from %d on", len(records), records[0].N)
	}
}

// The log goes on where it ended after a restart, entries that were queued when
// the journal closed are in it, and a cut end is noticed.
func TestAuditRestartAndCut(t *testing.T) {
	srv, nc := journaltest.Start(t, embedded.Options{})
	keyFile := t.TempDir() + "/key.json"
	first := openAudited(t, srv, nc, keyFile)
	for i := range 5 {
		first.AuditLater(entry(fmt.Sprint("queued:", i)))
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := first.Audit(t.Context(), entry("closed")); !errors.Is(err, journal.ErrUnavailable) {
		t.Fatalf("after Close: %v", err)
	}
	second := openAudited(t, srv, nc, keyFile)
	if err := second.Audit(t.Context(), entry("second")); err != nil {
		t.Fatal(err)
	}
	records, err := auditLog(t, second)
	if err != nil || len(records) != 6 || !bytes.Contains([]byte(records[5].Target), []byte("second")) {
		t.Fatalf("%d records, %v", len(records), err)
	}

	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), journal.AuditStream("eu"))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.DeleteMsg(t.Context(), stream.CachedInfo().State.LastSeq); err != nil {
		t.Fatal(err)
	}
	if _, err := auditLog(t, second); !errors.Is(err, journal.ErrAuditChain) {
		t.Fatalf("a log whose last record is gone: %v", err)
	}
	// Nothing is appended over the hole.
	third := openAudited(t, srv, nc, keyFile)
	if err := third.Audit(t.Context(), entry("over the hole")); !errors.Is(err, journal.ErrUnavailable) && !errors.Is(err, journal.ErrAuditChain) {
		t.Fatalf("append over the hole: %v", err)
	}
}
