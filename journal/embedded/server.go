package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

var (
	// ErrVersion means that the program was built with a nats-server older than
	// 2.15.1, which leaks memory in its TTL wheel and whose files were not
	// examined. Build with the version in go.mod.
	ErrVersion = errors.New("the embedded NATS server is too old")

	// ErrLocked means that another process, or another [Server] of this one,
	// has the folder. Stop the other one, or choose another folder.
	ErrLocked = errors.New("the store folder is in use")

	// ErrFrozen means that a stream of the server takes no writes until the
	// server has been restarted, because of a write error that the wrapped
	// error tells (ENOSPC, EIO). What was acknowledged is kept. When the disk
	// was full, the server restarts itself once there is room again.
	ErrFrozen = errors.New("the stream store is frozen by a write error")

	// ErrRestarting means that the server is being restarted. It wraps EAGAIN:
	// ask again shortly.
	ErrRestarting = fmt.Errorf("the stream store is restarting: %w", syscall.EAGAIN)

	// ErrLost means that the server found messages missing or damaged in its
	// files. Do not go on writing; run the verification and restore.
	ErrLost = errors.New("the stream store has lost messages")
)

// maxPayload has room for a keyring row of 1 MiB and its headers.
const maxPayload = 1<<20 + 64<<10

// Options say how a [Server] runs. Only StoreDir is required.
type Options struct {
	// StoreDir is the folder of the server's files; made when missing.
	StoreDir string
	// Name is the server's name in logs and clients; "coffer" when empty.
	Name string
	// MaxStore limits the bytes that the streams may take together; publishes
	// over it are refused as full while everything else goes on. 0 means what
	// the folder holds now, and what the file system has free, less a reserve
	// of 5 %, at least 64 MiB.
	MaxStore int64
	// SyncAlways makes the server sync every message or atomic batch itself, so
	// that [Server.Syncer] is nil.
	SyncAlways bool
	// Listen is "host:port" to accept connections on; empty for none. It is for
	// tests: whoever can connect can write to the streams.
	Listen string
	// Log receives what the server has to say; nil discards it.
	Log *slog.Logger
}

// A Server is a running NATS server with JetStream. Its methods may be called
// concurrently.
type Server struct {
	opts     Options
	log      *slog.Logger
	lock     *os.File
	maxStore int64
	ctx      context.Context //nolint:containedctx // the life of the watch
	cancel   context.CancelFunc
	done     chan struct{}

	// mu guards what a restart replaces.
	mu       sync.RWMutex
	srv      *server.Server
	syncer   *Syncer
	fallback string
	lostErr  error
	closed   bool
	stopped  bool // between the old server and the new one of a restart

	// restart serialises Restart and Close.
	restart sync.Mutex

	// probe replaces the start-up self-test in tests.
	probe func(context.Context, *Server, *Syncer) error
}

// Start starts a server and returns when JetStream has recovered its streams
// and the self-test has decided how writes are synced.
func Start(ctx context.Context, opts Options) (*Server, error) {
	return start(ctx, opts, selfTest)
}

func start(ctx context.Context, opts Options, probe func(context.Context, *Server, *Syncer) error) (*Server, error) {
	if err := checkVersion(server.VERSION); err != nil {
		return nil, err
	}
	if opts.StoreDir == "" {
		return nil, errors.New("embedded NATS: no store folder")
	}
	if opts.Name == "" {
		opts.Name = "coffer"
	}
	dir, err := filepath.Abs(opts.StoreDir)
	if err != nil {
		return nil, fmt.Errorf("embedded NATS: %w", err)
	}
	opts.StoreDir = dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("embedded NATS: %w", err)
	}
	s := &Server{
		opts: opts, log: opts.Log, probe: probe, done: make(chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.lock, err = lockFolder(dir); err != nil {
		return nil, err
	}
	if s.maxStore, err = maxStore(opts); err != nil {
		_ = s.lock.Close()
		return nil, fmt.Errorf("embedded NATS: %w", err)
	}
	if err := s.launch(ctx); err != nil {
		_ = s.lock.Close()
		return nil, err
	}
	go s.watch() //nolint:contextcheck // its life is not the caller's
	return s, nil
}

// checkVersion refuses versions before 2.15.1. A version that does not parse
// is one nobody examined.
func checkVersion(version string) error {
	parts := strings.SplitN(strings.SplitN(version, "-", 2)[0], ".", 3)
	var n [3]int
	for i := range n {
		if i >= len(parts) {
			return fmt.Errorf("%w: version %q", ErrVersion, version)
		}
		v, err := strconv.Atoi(parts[i])
		if err != nil {
			return fmt.Errorf("%w: version %q", ErrVersion, version)
		}
		n[i] = v
	}
	if n[0] < 2 || n[0] == 2 && (n[1] < 15 || n[1] == 15 && n[2] < 1) {
		return fmt.Errorf("%w: version %s, at least 2.15.1 is needed", ErrVersion, version)
	}
	return nil
}

// launch starts the server, with syncs of our own when that passes the
// self-test, otherwise with sync always.
func (s *Server) launch(ctx context.Context) error {
	reason := "asked for by the options"
	if !s.opts.SyncAlways {
		srv, err := s.run(ctx, false)
		if err != nil {
			return err
		}
		syncer := newSyncer(s.streamsDir())
		s.set(srv, nil, "")
		err = checkFileSystem(s.opts.StoreDir)
		if err == nil {
			err = s.probe(ctx, s, syncer)
		}
		if err == nil {
			s.set(srv, syncer, "")
			return nil
		}
		reason = err.Error()
		syncer.close()
		halt(srv)
		if ctx.Err() != nil {
			return fmt.Errorf("embedded NATS: start: %w", ctx.Err())
		}
		s.log.Warn("syncs of our own are not possible, the NATS server syncs always", "reason", reason, "dir", s.opts.StoreDir)
	}
	srv, err := s.run(ctx, true)
	if err != nil {
		return err
	}
	s.set(srv, nil, reason)
	return nil
}

func (s *Server) set(srv *server.Server, syncer *Syncer, fallback string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.srv, s.syncer, s.fallback = srv, syncer, fallback
}

func (s *Server) run(ctx context.Context, syncAlways bool) (*server.Server, error) {
	opts := &server.Options{
		ServerName:             s.opts.Name,
		DontListen:             true,
		NoSigs:                 true,
		JetStream:              true,
		StoreDir:               s.opts.StoreDir,
		JetStreamMaxStore:      s.maxStore,
		JetStreamMaxMemory:     256 << 20,
		MaxPayload:             maxPayload,
		SyncAlways:             syncAlways,
		DisableJetStreamBanner: true,
		NoSystemAccount:        true,
	}
	if s.opts.Listen != "" {
		host, port, err := net.SplitHostPort(s.opts.Listen)
		if err != nil {
			return nil, fmt.Errorf("embedded NATS: listen: %w", err)
		}
		if opts.Port, err = strconv.Atoi(port); err != nil {
			return nil, fmt.Errorf("embedded NATS: listen: %w", err)
		}
		if opts.Port == 0 {
			opts.Port = server.RANDOM_PORT
		}
		opts.Host, opts.DontListen = host, false
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("embedded NATS: %w", err)
	}
	srv.SetLoggerV2(&logger{s.log.With("nats_server", s.opts.Name)}, false, false, false)
	srv.Start()
	for !srv.ReadyForConnections(10*time.Millisecond) || !srv.JetStreamEnabled() {
		if err := ctx.Err(); err != nil {
			halt(srv)
			return nil, fmt.Errorf("embedded NATS: start: %w", err)
		}
		if !srv.Running() {
			halt(srv)
			return nil, errors.New("embedded NATS: the server stopped while starting; see the log")
		}
		time.Sleep(time.Millisecond)
	}
	return srv, nil
}

func halt(srv *server.Server) {
	srv.Shutdown()
	srv.WaitForShutdown()
}

func (s *Server) streamsDir() string {
	return filepath.Join(s.opts.StoreDir, server.JetStreamStoreDir, server.DEFAULT_GLOBAL_ACCOUNT, "streams")
}

// StoreDir returns the folder of the server's files.
func (s *Server) StoreDir() string { return s.opts.StoreDir }

// StreamDir returns the folder in which the server keeps a stream's files.
func (s *Server) StreamDir(stream string) string { return filepath.Join(s.streamsDir(), stream) }

// Syncer returns what syncs appended messages, or nil when the server syncs
// always. It stays valid across [Server.Restart].
func (s *Server) Syncer() *Syncer {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.syncer
}

// Fallback returns why the server syncs always, or "" when [Server.Syncer] is
// used.
func (s *Server) Fallback() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.fallback
}

// ClientURL returns the address that the server listens on when
// [Options].Listen is set.
func (s *Server) ClientURL() string { return s.current().ClientURL() }

func (s *Server) current() *server.Server {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.srv
}

// InProcessConn connects to the server, or to the one that a restart has put in
// its place. It implements nats.InProcessConnProvider.
func (s *Server) InProcessConn() (net.Conn, error) { return s.current().InProcessConn() }

// Connect returns a connection inside the process. It reconnects for ever,
// and sends nothing again on its own after it has: the journal decides what was
// stored. The caller closes it, before the server.
func (s *Server) Connect(opts ...nats.Option) (*nats.Conn, error) {
	all := append([]nats.Option{
		nats.Name("coffer " + s.opts.Name),
		nats.InProcessServer(s),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(5 * time.Millisecond),
		nats.ReconnectJitter(time.Millisecond, time.Millisecond),
		nats.ReconnectBufSize(-1),
		nats.SkipSubjectValidation(),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			s.log.Debug("connection inside the process", "error", err)
		}),
	}, opts...)
	nc, err := nats.Connect("", all...)
	if err != nil {
		return nil, fmt.Errorf("connect to the embedded NATS server: %w", err)
	}
	return nc, nil
}

// Restart stops the server and starts it again; connections made by
// [Server.Connect] reconnect. It is what unfreezes a stream after a write error.
func (s *Server) Restart(ctx context.Context) error {
	s.restart.Lock()
	defer s.restart.Unlock()
	s.mu.RLock()
	srv, syncer, closed := s.srv, s.syncer, s.closed
	s.mu.RUnlock()
	if closed {
		return errors.New("embedded NATS: restart: closed")
	}
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	halt(srv)
	next, err := s.run(ctx, syncer == nil)
	if syncer != nil {
		syncer.reset()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped, s.lostErr = false, nil // the new server looks for itself
	if err != nil {
		return err
	}
	s.srv = next
	return nil
}

// Close stops the server and waits until its files are written. Calling it
// again does nothing.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	<-s.done
	s.restart.Lock() // a Restart that is under way ends first
	defer s.restart.Unlock()
	halt(s.current())
	if syncer := s.Syncer(); syncer != nil {
		syncer.close()
	}
	if err := s.lock.Close(); err != nil {
		return fmt.Errorf("embedded NATS: close: %w", err)
	}
	return nil
}
