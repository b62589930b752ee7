package node

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// TestDayOfDirectory: data keeps the day that it was made with, and a server that
// keeps data for people has whole ones.
func TestDayOfDirectory(t *testing.T) {
	checkLeaks(t)
	for _, day := range []time.Duration{-time.Second, time.Millisecond, 25 * time.Hour} {
		if _, err := Dev(t.Context(), DevOptions{Dir: filepath.Join(t.TempDir(), "no"), Day: day}); !errors.Is(err, config.ErrInvalid) {
			t.Errorf("a day of %s: %v", day, err)
		}
	}
	dir := filepath.Join(t.TempDir(), "data")
	open := func(day time.Duration) error {
		p, err := Dev(t.Context(), DevOptions{Dir: dir, Day: day})
		if err != nil {
			return err
		}
		for _, r := range p.regions {
			if drifts, err := r.journal.Check(t.Context()); err != nil || len(drifts) > 0 {
				t.Errorf("region %s: %v, %v", r.config.ID, drifts, err)
			}
		}
		return p.Close(context.Background())
	}
	for range 2 {
		if err := open(time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	for _, day := range []time.Duration{0, 24 * time.Hour, time.Second} {
		if err := open(day); !errors.Is(err, config.ErrInvalid) {
			t.Errorf("opened with a day of %s: %v", day, err)
		}
	}
	cfg := plain(production(t, ""))
	cfg.DataDir = dir
	if p, err := Open(t.Context(), cfg, nil); !errors.Is(err, config.ErrInvalid) {
		t.Errorf("opened for people: %v", err)
		if err == nil {
			_ = p.Close(context.Background())
		}
	}
	dir = filepath.Join(t.TempDir(), "whole")
	if err := open(0); err != nil {
		t.Fatal(err)
	}
	if err := open(time.Minute); !errors.Is(err, config.ErrInvalid) {
		t.Errorf("whole days shortened: %v", err)
	}
}
