package embedded

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	reserveShare = 20 // a twentieth of what is free
	minReserve   = 64 << 20
	watchEvery   = time.Second
	lostEvery    = 30 // times watchEvery
)

// maxStore decides the server's limit. It must be explicit: the server's own
// default is three quarters of what happens to be free, also when most of that
// is taken by the streams themselves.
func maxStore(o Options) (int64, error) {
	if o.MaxStore > 0 {
		return o.MaxStore, nil
	}
	free, err := freeBytes(o.StoreDir)
	if err != nil {
		return 0, err
	}
	var used int64
	err = filepath.WalkDir(o.StoreDir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return skipVanished(err)
		}
		info, err := d.Info()
		if err != nil {
			return skipVanished(err)
		}
		used += info.Size()
		return nil
	})
	if err != nil {
		return 0, err
	}
	return max(used+free-max(free/reserveShare, minReserve), minReserve), nil
}

func skipVanished(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Check reports whether the server can take writes: [ErrFrozen] when a stream
// stopped after a write error or JetStream is off, [ErrRestarting], [ErrLost] when the server has
// noticed, while reading its files, that messages are missing. (It does not
// notice all: a last block that was cut is just a shorter stream. Readers hold
// sequences against what they have seen.) It looks at every stream; ask every
// few seconds, not for every request.
func (s *Server) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("check the embedded NATS server: %w", err)
	}
	s.mu.RLock()
	srv, stopped := s.srv, s.stopped
	s.mu.RUnlock()
	switch {
	case stopped:
		return ErrRestarting
	case !srv.Running() || !srv.JetStreamEnabled():
		return fmt.Errorf("check the embedded NATS server: %w: JetStream is off", ErrFrozen)
	}
	if err := frozen(srv); err != nil {
		return err
	}
	if syncer := s.Syncer(); syncer != nil {
		if err := syncer.failure(); err != nil {
			return err
		}
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.lostErr
}

func frozen(srv *server.Server) error {
	health := srv.Healthz(&server.HealthzOptions{Account: server.DEFAULT_GLOBAL_ACCOUNT, Details: true})
	for _, e := range health.Errors {
		// A stream that is being removed is renamed to start with a dot first.
		if e.Type != server.HealthzErrorStream || strings.HasPrefix(e.Stream, ".") {
			continue
		}
		if strings.Contains(e.Error, "no space left") {
			return fmt.Errorf("%w: stream %s: %w", ErrFrozen, e.Stream, syscall.ENOSPC)
		}
		return fmt.Errorf("%w: stream %s: %s", ErrFrozen, e.Stream, e.Error)
	}
	return nil
}

// lost asks each stream for the messages that the server knows it has lost. The
// server tells only with the list of deleted sequences, which may be long.
func (s *Server) lost(ctx context.Context) error {
	nc, err := s.Connect(nats.NoReconnect())
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("check the embedded NATS server: %w", err)
	}
	names := js.StreamNames(ctx)
	for name := range names.Name() {
		stream, err := js.Stream(ctx, name)
		if err != nil {
			continue // it was deleted, or the next look will tell
		}
		info, err := stream.Info(ctx, jetstream.WithDeletedDetails(true))
		if err != nil {
			continue
		}
		// A write that failed half-way is reported as lost too; it was never
		// acknowledged, and lies behind the end.
		if l := info.State.Lost; l != nil {
			for _, seq := range l.Msgs {
				if seq <= info.State.LastSeq {
					return fmt.Errorf("%w: stream %s: %d messages, one at sequence %d", ErrLost, name, len(l.Msgs), seq)
				}
			}
		}
	}
	if err := names.Err(); err != nil {
		return fmt.Errorf("check the embedded NATS server: %w", err)
	}
	return nil
}

// lookForLost remembers what lost finds.
func (s *Server) lookForLost() {
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	if err := s.lost(ctx); errors.Is(err, ErrLost) {
		s.log.Error("messages are lost", "error", err)
		s.mu.Lock()
		s.lostErr = err
		s.mu.Unlock()
	}
}

// watch syncs what was written outside of commits (tombstones of expiry), and
// restarts the server once a full disk has room again.
func (s *Server) watch() {
	defer close(s.done)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		if syncer := s.Syncer(); syncer != nil {
			syncer.settle()
		}
		err := frozen(s.current())
		if err == nil && n%lostEvery == 0 {
			s.lookForLost()
		}
		if !errors.Is(err, syscall.ENOSPC) || !s.hasRoom() {
			continue
		}
		s.log.Warn("the disk has room again, restarting the NATS server", "dir", s.opts.StoreDir)
		ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
		if err := s.Restart(ctx); err != nil {
			s.log.Error("restart of the NATS server failed", "error", err)
		}
		cancel()
	}
}

func (s *Server) hasRoom() bool {
	free, err := freeBytes(s.opts.StoreDir)
	return err == nil && free > 16<<20
}

// lockFolder takes the folder for this Server, until the file is closed.
func lockFolder(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("embedded NATS: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrLocked, dir)
		}
		return nil, fmt.Errorf("embedded NATS: lock %s: %w", dir, err)
	}
	return f, nil
}
