package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/server"
	"github.com/cofferdb/coffer/journal"
)

// Region is a region that a process serves, as others reach it.
type Region struct {
	ID    string
	Place string
	URL   string

	// What follows is set by Dev only.

	App    string // the development app's id
	Compat string // the base of its paths on the compatibility listener; empty without one
	dev    *devApp
}

// Process is a running server.
type Process struct {
	Dir     string
	Regions []Region

	// What follows is set by Dev only.

	CAFile  string
	EnvFile string // shell lines of region eu, mode 0600
	File    string // JSON of every region, mode 0600

	cfg     config.Config
	log     *slog.Logger
	lock    *os.File
	regions []*region
	failed  chan error // the first failure after the start

	background sync.WaitGroup
	stop       context.CancelFunc
	closing    sync.Once
	closed     error
}

// Open starts everything that the configuration says, and returns when every
// region's listener answers. Close the process.
func Open(ctx context.Context, cfg config.Config, log *slog.Logger) (*Process, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	lock, err := prepare(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	if err := checkDay(cfg.DataDir, 0); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return start(ctx, cfg, log, lock, clock{now: time.Now})
}

// prepare makes the process and its data directory safe to hold secrets.
func prepare(dir string) (*os.File, error) {
	if err := hardenProcess(); err != nil {
		return nil, err
	}
	if err := secureDir(dir); err != nil {
		return nil, err
	}
	return lockDir(dir)
}

// start takes over the lock.
func start(ctx context.Context, cfg config.Config, log *slog.Logger, lock *os.File, clock clock) (*Process, error) {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	p := &Process{Dir: cfg.DataDir, cfg: cfg, log: log, lock: lock, failed: make(chan error, 1), stop: stop}
	connections, err := connectionLimit(cfg, log)
	if err != nil {
		return nil, errors.Join(err, p.Close(ctx))
	}
	var served []config.Region
	for _, r := range cfg.Regions {
		if r.Listen != "" {
			served = append(served, r)
		}
	}
	p.regions = make([]*region, len(served))
	group, groupCtx := errgroup.WithContext(ctx)
	for i, r := range served {
		group.Go(func() error {
			opened, err := openRegion(groupCtx, regionOptions{
				config: cfg, region: r, connections: connections, log: log.With("region", r.ID), now: clock.now, day: clock.day,
			})
			p.regions[i] = opened // also when it failed half-way: Close ends what was begun
			if err != nil {
				return fmt.Errorf("region %s: %w", r.ID, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, errors.Join(err, p.Close(ctx))
	}
	p.introduce()
	for _, r := range p.regions {
		p.background.Go(func() {
			if err := r.run(background); err != nil {
				select {
				case p.failed <- fmt.Errorf("region %s: %w", r.config.ID, err):
				default:
				}
			}
		})
		p.Regions = append(p.Regions, Region{ID: r.config.ID, Place: r.config.Place, URL: r.url})
	}
	return p, nil
}

// introduce tells each region where the others are, for callers of the wrong
// one. A listener on a free port knows its address only now.
func (p *Process) introduce() {
	elsewhere := make(map[byte]server.Place)
	for _, r := range p.cfg.Regions {
		elsewhere[r.Journal().Number] = server.Place{Region: r.ID, URL: r.URL}
	}
	for _, r := range p.regions {
		elsewhere[r.config.Journal().Number] = server.Place{Region: r.config.ID, URL: r.url, Compat: r.compat.address()}
	}
	// Regions that exist and are served by nobody known here are still named.
	for _, r := range journal.DefaultRegions() {
		if _, ok := elsewhere[r.Number]; !ok {
			elsewhere[r.Number] = server.Place{Region: r.ID}
		}
	}
	for _, r := range p.regions {
		r.elsewhere = elsewhere
	}
}

// Wait returns nil when ctx ends, and an error when a part of the process has
// failed in a way that only a restart mends.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-p.failed:
		return err
	}
}

// Close shuts everything down: followed streams get their trailer, open
// requests may finish until ctx ends or the configured time is over, what was
// acknowledged is on disk already. It is safe to call it again.
func (p *Process) Close(ctx context.Context) error {
	p.closing.Do(func() {
		timeout := time.Duration(p.cfg.ShutdownTimeout)
		if timeout <= 0 {
			timeout = 30 * time.Second
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
		var mu sync.Mutex
		var errs []error
		var group sync.WaitGroup
		for _, r := range p.regions {
			if r == nil {
				continue
			}
			group.Go(func() {
				if err := r.closeListener(ctx); err != nil {
					mu.Lock()
					defer mu.Unlock()
					errs = append(errs, fmt.Errorf("region %s: %w", r.config.ID, err))
				}
			})
		}
		group.Wait()
		p.stop()
		p.background.Wait()
		for _, r := range p.regions {
			if r == nil {
				continue
			}
			group.Go(func() {
				if err := r.close(); err != nil {
					mu.Lock()
					defer mu.Unlock()
					errs = append(errs, fmt.Errorf("region %s: %w", r.config.ID, err))
				}
			})
		}
		group.Wait()
		if p.EnvFile != "" {
			errs = append(errs, removeDevFiles(p.Dir))
		}
		if p.lock != nil {
			errs = append(errs, p.lock.Close())
		}
		p.closed = errors.Join(errs...)
	})
	return p.closed
}

// Serve opens a process and keeps it until ctx ends or a part fails.
func Serve(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	p, err := Open(ctx, cfg, log)
	if err != nil {
		return err
	}
	for _, r := range p.Regions {
		p.log.Info("serving", "region", r.ID, "url", r.URL)
	}
	return errors.Join(p.Wait(ctx), p.Close(ctx))
}

func regionDir(dataDir, id string) string { return filepath.Join(dataDir, id) }
