package pebble

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/cofferdb/coffer/projections"
)

// TestSettle: what is settled has nothing left to do, and who waits can stop.
func TestSettle(t *testing.T) {
	t.Parallel()
	s := open(t, small(t.TempDir()))
	defer s.Close()
	value := make([]byte, 500)
	for i := range 100 {
		err := s.Update(func(txn projections.Txn) error {
			for j := range 100 {
				txn.Set(binary.LittleEndian.AppendUint64([]byte{'k'}, uint64(100*i+j)), value)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	m := s.db.Metrics()
	if m.Flush.NumInProgress+m.Compact.NumInProgress != 0 || m.Flush.Count == 0 || m.Compact.Count == 0 {
		t.Errorf("%d flushes and %d compactions, %d and %d under way", m.Flush.Count, m.Compact.Count, m.Flush.NumInProgress, m.Compact.NumInProgress)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Settle(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Settle with a cancelled context = %v", err)
	}
}
