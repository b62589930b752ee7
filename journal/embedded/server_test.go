package embedded

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// start starts a server that ends with the test.
func startTest(t *testing.T, opts Options) (*Server, jetstream.JetStream) {
	t.Helper()
	if opts.StoreDir == "" {
		opts.StoreDir = t.TempDir()
	}
	s, err := Start(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, connect(t, s)
}

func connect(t *testing.T, s *Server) jetstream.JetStream {
	t.Helper()
	nc, err := s.Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

// ownSync skips the test where the server has to sync always.
func ownSync(t *testing.T, s *Server) *Syncer {
	t.Helper()
	if reason := s.Fallback(); reason != "" {
		if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
			t.Fatalf("COFFER_TEST_REQUIRE=all: syncs of our own are needed: %s", reason)
		}
		t.Skipf("skipped: needs syncs of our own (Linux, ext4 or btrfs): %s", reason)
	}
	return s.Syncer()
}

func makeStream(t *testing.T, js jetstream.JetStream, c jetstream.StreamConfig) jetstream.Stream {
	t.Helper()
	c.Storage = jetstream.FileStorage
	if c.Subjects == nil {
		c.Subjects = []string{c.Name + ".>"}
	}
	st, err := js.CreateStream(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestVersion(t *testing.T) {
	for version, ok := range map[string]bool{
		"2.15.1": true, "2.15.2": true, "2.16.0-RC.1": true, "3.0.0": true,
		"2.15.0": false, "2.14.9": false, "1.99.99": false, "2.15": false, "": false, "2.15.x": false,
	} {
		err := checkVersion(version)
		if ok != (err == nil) || err != nil && !errors.Is(err, ErrVersion) {
			t.Errorf("version %q: %v", version, err)
		}
	}
}

func TestRestartKeepsMessages(t *testing.T) {
	dir := t.TempDir()
	s, err := Start(t.Context(), Options{StoreDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	js := connect(t, s)
	makeStream(t, js, jetstream.StreamConfig{Name: "A"})
	for i := range 10 {
		if _, err := js.Publish(t.Context(), "A.x", []byte(strconv.Itoa(i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The connection reconnects by itself.
	for {
		if _, err := js.Publish(t.Context(), "A.x", []byte("after")); err == nil {
			break
		}
		if t.Context().Err() != nil {
			t.Fatal(t.Context().Err())
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
	if err := s.Restart(t.Context()); err == nil {
		t.Error("a closed server was restarted")
	}
	_, js = startTest(t, Options{StoreDir: dir})
	st, err := js.Stream(t.Context(), "A")
	if err != nil {
		t.Fatal(err)
	}
	if got := st.CachedInfo().State.Msgs; got != 11 {
		t.Errorf("%d messages after a restart, want 11", got)
	}
}

func TestFolderIsLocked(t *testing.T) {
	s, _ := startTest(t, Options{})
	if _, err := Start(t.Context(), Options{StoreDir: s.StoreDir()}); !errors.Is(err, ErrLocked) {
		t.Errorf("a second server on the same folder: %v", err)
	}
}

func TestSelfTestDecides(t *testing.T) {
	var log bytes.Buffer
	opts := Options{StoreDir: t.TempDir(), Log: slog.New(slog.NewTextHandler(&log, nil))}
	s, err := start(t.Context(), opts, func(context.Context, *Server, *Syncer) error {
		return errors.New("blocks lie elsewhere")
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if s.Syncer() != nil || s.Fallback() == "" {
		t.Errorf("syncer %v, fallback %q after a failed self-test", s.Syncer(), s.Fallback())
	}
	if !syncsAlways(t, s) {
		t.Error("the server does not sync always")
	}
	if !strings.Contains(log.String(), "blocks lie elsewhere") {
		t.Errorf("the reason is not in the log: %s", log.String())
	}
	if err := s.Syncer().Sync("anything"); err != nil {
		t.Errorf("a nil syncer: %v", err)
	}
}

// TestSelfTestNotices breaks, one by one, what the self-test is there for.
func TestSelfTestNotices(t *testing.T) {
	s, _ := startTest(t, Options{})
	ownSync(t, s)
	t.Run("elsewhere", func(t *testing.T) {
		if err := selfTest(t.Context(), s, newSyncer(t.TempDir())); err == nil {
			t.Error("blocks in another folder were not noticed")
		}
	})
	t.Run("right", func(t *testing.T) {
		if err := selfTest(t.Context(), s, newSyncer(s.streamsDir())); err != nil {
			t.Error(err)
		}
	})
}

func TestSyncFollowsBlocks(t *testing.T) {
	s, js := startTest(t, Options{})
	syncer := ownSync(t, s)
	// 96 kB of limit makes blocks of 32 kB.
	st := makeStream(t, js, jetstream.StreamConfig{Name: "A", MaxBytes: 96 << 10})
	follows := func(what string) {
		t.Helper()
		payload := canary(700)
		if _, err := js.Publish(t.Context(), "A.x", payload); err != nil {
			t.Fatal(err)
		}
		if err := syncer.Sync("A"); err != nil {
			t.Fatal(err)
		}
		b := syncer.of("A")
		b.mu.Lock() // the server's watch settles beside
		defer b.mu.Unlock()
		open, err := b.last.Stat()
		if err != nil {
			t.Fatal(err)
		}
		now, err := os.Stat(b.path(b.index))
		if err != nil {
			t.Fatal(err)
		}
		if !os.SameFile(open, now) {
			t.Fatalf("%s: the open file is not %s", what, b.path(b.index))
		}
		if err := contains(b.path(b.index), payload, true); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	at := func() (index int, settled bool) {
		b := syncer.of("A")
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.index, b.settled
	}
	// rests waits until nothing but the folder's time is looked at.
	rests := func() {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(freshFolder / 10) {
			if _, settled := at(); settled {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("the folder does not come to rest")
			}
			follows("resting")
		}
	}
	for range 300 { // through many blocks, the first of which vanish by the limit
		follows("append")
	}
	if i, _ := at(); i < 5 {
		t.Fatalf("only %d blocks", i)
	}
	rests()
	before, _ := at()
	for now, n := before, 0; now == before; n++ {
		if follows("append after a rest"); n > 100 {
			t.Fatal("no new block")
		}
		now, _ = at()
	}
	rests()
	// Several blocks between two syncs.
	for range 200 {
		if _, err := js.Publish(t.Context(), "A.x", canary(700)); err != nil {
			t.Fatal(err)
		}
	}
	follows("many blocks later")
	rests()
	info, err := st.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := st.SecureDeleteMsg(t.Context(), info.State.LastSeq-1); err != nil {
		t.Fatal(err)
	}
	follows("after a rewrite")
	rests()
	// Everything goes: the server starts a new block for the last sequence.
	if err := st.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	follows("after a purge")
	info, err = st.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := st.SecureDeleteMsg(t.Context(), info.State.LastSeq); err != nil {
		t.Fatal(err)
	}
	syncer.settle()
	follows("after the last message was erased")
	if err := syncer.SyncMeta("A"); err != nil {
		t.Error(err)
	}
	if err := syncer.SyncFolder("A"); err != nil {
		t.Error(err)
	}
}

func TestSyncFailsForGood(t *testing.T) {
	s, _ := startTest(t, Options{})
	syncer := ownSync(t, s)
	if err := syncer.Sync("missing"); err == nil {
		t.Fatal("a stream that is not there was synced")
	}
	if err := os.MkdirAll(filepath.Join(s.StreamDir("missing"), "msgs"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.StreamDir("missing"), "msgs", "1.blk"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syncer.Sync("missing"); err == nil {
		t.Error("a failed sync was forgotten")
	}
	if err := s.Check(t.Context()); !errors.Is(err, ErrFrozen) {
		t.Errorf("health after a failed sync: %v", err)
	}
	syncer.reset()
	if err := syncer.Sync("missing"); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

func TestLostMessagesAreNotReady(t *testing.T) {
	dir := t.TempDir()
	s, err := Start(t.Context(), Options{StoreDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	js := connect(t, s)
	makeStream(t, js, jetstream.StreamConfig{Name: "A", MaxBytes: 96 << 10})
	for range 100 { // two blocks
		if _, err := js.Publish(t.Context(), "A.x", canary(500)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	block := filepath.Join(s.StreamDir("A"), "msgs", "1.blk")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(block)
	if err != nil {
		t.Fatal(err)
	}
	content[len(content)/2] ^= 1
	if err := os.WriteFile(block, content, 0o600); err != nil {
		t.Fatal(err)
	}
	s, js = startTest(t, Options{StoreDir: dir})
	st, err := js.Stream(t.Context(), "A")
	if err != nil {
		t.Fatal(err)
	}
	for seq := range uint64(100) {
		if _, err := st.GetMsg(t.Context(), seq+1); err != nil {
			t.Logf("message %d: %v", seq+1, err)
			break
		}
	}
	s.lookForLost()
	if err := s.Check(t.Context()); !errors.Is(err, ErrLost) {
		t.Errorf("a damaged block that was read: %v", err)
	}
}

func syncsAlways(t *testing.T, s *Server) bool {
	t.Helper()
	z, err := s.current().Jsz(nil)
	if err != nil {
		t.Fatal(err)
	}
	return z.Config.SyncAlways
}
