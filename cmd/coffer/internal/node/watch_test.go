package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// tooSlow is the exit code of watch_retention.py on a machine that was too slow for
// the days of its server.
const tooSlow = 3

// TestWatchRetention runs the script that watches data end, as the documentation has
// it, for what is over within seven days. COFFER_TEST_WATCH=180 waits for every plan,
// for accounts and for profiles, and 400 for the audit log too; that takes as many
// seconds, so give -timeout too.
func TestWatchRetention(t *testing.T) {
	need(t, "python3", "install Python 3")
	days := os.Getenv("COFFER_TEST_WATCH")
	if days == "" {
		days = "7"
	}
	for _, day := range []time.Duration{time.Second, 4 * time.Second, 16 * time.Second} {
		out, code := watch(t, day, days)
		if code == tooSlow {
			t.Logf("a day of %s was too short for this machine:\n%s", day, out)
			continue
		}
		if code != 0 {
			t.Errorf("exit code %d", code)
		}
		t.Logf("%s", out)
		return
	}
	t.Error("no day was long enough")
}

func watch(t *testing.T, day time.Duration, days string) (out []byte, code int) {
	t.Helper()
	p, err := Dev(t.Context(), DevOptions{
		Dir: filepath.Join(t.TempDir(), "data"), Day: day, Log: slog.New(slog.DiscardHandler), Callbacks: config.Callbacks{Allow: []string{"127.0.0.0/8"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour) // bounds a hang
	defer cancel()
	cmd := exec.CommandContext(ctx, "python3", "../../../../docs/operations/watch_retention.py", p.File, day.String(), "--days", days) //nolint:gosec // of this repository
	cmd.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
	out, err = cmd.CombinedOutput()
	exit, failed := errors.AsType[*exec.ExitError](err)
	switch {
	case failed:
		return out, exit.ExitCode()
	case err != nil:
		t.Fatal(err)
	}
	return out, 0
}
