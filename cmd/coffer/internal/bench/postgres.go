package bench

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// postgres is a cluster of its own, with fsync on, for one benchmark.
type postgres struct {
	version string
	dir     string
	url     string
	remove  func()
	command *exec.Cmd
	output  *bytes.Buffer
	exited  chan error
}

// postgresSettings are what one would set for this load: enough memory, and no
// checkpoint in the middle of a round. What makes a commit durable is left on.
func postgresSettings() []string {
	return []string{
		"listen_addresses=", "fsync=on", "synchronous_commit=on", "full_page_writes=on", "shared_buffers=512MB",
		"max_wal_size=8GB", "checkpoint_timeout=30min", "autovacuum=off", "jit=off",
	}
}

// startPostgres starts a cluster. Where it cannot be, it says why in skipped.
func startPostgres(ctx context.Context, o Options) (pg *postgres, skipped string, err error) {
	if o.NoPostgres {
		return nil, "not asked for", nil
	}
	initdb, server := findProgram("initdb"), findProgram("postgres")
	if initdb == "" || server == "" {
		return nil, "initdb and postgres are not on this machine; install the package postgresql", nil
	}
	if !reachable(o.Dir) {
		o.Dir = "" // the user that it runs as can reach the system's folder
	}
	dir, remove, err := tempDir(o)
	if err != nil {
		return nil, "", err
	}
	pg = &postgres{dir: dir, remove: remove, output: &bytes.Buffer{}, exited: make(chan error, 1)}
	run, reason, err := asOrdinaryUser(dir)
	if err != nil || reason != "" {
		remove()
		return nil, reason, err
	}
	if err := pg.start(ctx, initdb, server, run); err != nil {
		return nil, "", errors.Join(fmt.Errorf("start Postgres: %w", err), pg.close())
	}
	o.Log.InfoContext(ctx, "Postgres is started", "version", pg.version)
	return pg, "", nil
}

// findProgram looks in PATH and where packages put the newest version.
func findProgram(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	if err != nil || len(found) == 0 {
		return ""
	}
	return slices.MaxFunc(found, func(a, b string) int {
		if d := len(a) - len(b); d != 0 {
			return d // 9.6 before 15
		}
		return strings.Compare(a, b)
	})
}

func (p *postgres) start(ctx context.Context, initdb, server string, run func(*exec.Cmd)) error {
	data := filepath.Join(p.dir, "data")
	create := exec.CommandContext(ctx, initdb, "-D", data, "-A", "trust", "-U", "bench", "-E", "UTF8", "--locale=C", "--no-instructions") //nolint:gosec // found above
	create.Dir = p.dir
	run(create)
	if out, err := create.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w: %s", err, bytes.TrimSpace(out))
	}
	args := []string{"-D", data, "-k", p.dir}
	for _, s := range postgresSettings() {
		args = append(args, "-c", s)
	}
	p.command = exec.Command(server, args...) //nolint:gosec,noctx // it is stopped by close, gently
	p.command.Dir = p.dir
	p.command.Stdout, p.command.Stderr = p.output, p.output
	run(p.command)
	if err := p.command.Start(); err != nil {
		p.command = nil
		return err
	}
	go func() { p.exited <- p.command.Wait() }()

	p.url = "host=" + p.dir + " user=bench dbname=postgres"
	for {
		conn, err := p.connect(ctx)
		if err == nil {
			defer func() { _ = conn.Close(ctx) }()
			if err := conn.QueryRow(ctx, "SELECT 'Postgres ' || split_part(current_setting('server_version'), ' ', 1)").Scan(&p.version); err != nil {
				return err
			}
			return nil
		}
		select {
		case err := <-p.exited:
			p.exited <- err
			return fmt.Errorf("it ended: %w: %s", err, bytes.TrimSpace(p.output.Bytes()))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (p *postgres) connect(ctx context.Context) (*pgx.Conn, error) { return pgx.Connect(ctx, p.url) }

// close stops the cluster and removes its folder.
func (p *postgres) close() error {
	defer p.remove()
	if p.command == nil {
		return nil
	}
	// SIGINT asks for a fast shutdown: sessions are ended, files are closed.
	if err := p.command.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop Postgres: %w", err)
	}
	select {
	case <-p.exited: //nolint:errcheck // it was told to end
		return nil
	case <-time.After(30 * time.Second):
		_ = p.command.Process.Kill()
		<-p.exited //nolint:errcheck // it was killed
		return errors.New("stop Postgres: it did not end within 30 s")
	}
}

// committer inserts what has arrived in one statement, and so in one synced
// transaction, as [bare] does for a stream.
type committer struct {
	conn    *pgx.Conn
	payload []byte
	wake    chan struct{}
	quit    chan struct{}
	ended   chan struct{}

	mu      sync.Mutex // guards what follows
	pending []chan error
}

func (p *postgres) openCommitter(ctx context.Context, size int) (*committer, error) {
	conn, err := p.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to Postgres: %w", err)
	}
	const schema = `CREATE TABLE events (position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, record bytea NOT NULL)`
	if _, err := conn.Exec(ctx, schema); err != nil {
		return nil, errors.Join(fmt.Errorf("make the table: %w", err), conn.Close(ctx))
	}
	c := &committer{
		conn: conn, payload: make([]byte, size), wake: make(chan struct{}, 1), quit: make(chan struct{}), ended: make(chan struct{}),
	}
	rand.Read(c.payload) // never fails; it ends the process instead
	go c.run()           //nolint:contextcheck // its life is not the caller's
	return c, nil
}

func (c *committer) close() error {
	close(c.quit)
	<-c.ended
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return c.conn.Close(ctx)
}

func (c *committer) append(ctx context.Context, _, _ int) error {
	done := make(chan error, 1)
	c.mu.Lock()
	c.pending = append(c.pending, done)
	first := len(c.pending) == 1
	c.mu.Unlock()
	if first {
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *committer) run() {
	defer close(c.ended)
	for {
		c.mu.Lock()
		batch := c.pending
		c.pending = nil
		c.mu.Unlock()
		if len(batch) == 0 {
			select {
			case <-c.wake:
				continue
			case <-c.quit:
				return
			}
		}
		records := make([][]byte, len(batch))
		for i := range records {
			records[i] = c.payload
		}
		// The rows are one array: a list of VALUES is slower to plan.
		_, err := c.conn.Exec(context.Background(), "INSERT INTO events (record) SELECT unnest($1::bytea[])", records)
		for _, done := range batch {
			done <- err
		}
	}
}
