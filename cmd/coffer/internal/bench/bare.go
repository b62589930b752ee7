package bench

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
)

const (
	// bareCommit is the largest commit; the server queues 10,000 messages.
	bareCommit = 4096
	// bareBatch is the largest atomic batch.
	bareBatch = 1000
)

// bare is what the journal is measured against: a stream configured as the
// journal's, and one committer that publishes payloads and makes them durable.
// It does nothing else: no sealing, no check, no position for the caller.
//
// It has its own code for syncing, so that it does not move with the journal's:
// asynchronous publishes over an in-process connection, all acknowledgements
// awaited, then fdatasync of the stream's blocks that were written to since the
// last time, and fsync of their folder when one was added. Where the embedded
// server syncs by itself, it uses atomic batches.
type bare struct {
	server   *embedded.Server
	conn     *nats.Conn
	js       jetstream.JetStream
	subjects []string
	writers  []bareEvent // what each writer appends
	stream   string
	folder   *os.File
	block    int // number of the last block that was synced
	last     *os.File

	acks   *nats.Subscription
	inbox  string
	wake   chan struct{}
	quit   chan struct{}
	ended  chan struct{}
	answer chan error // of capacity 1: the acknowledgements of a commit

	mu      sync.Mutex // guards what follows
	pending []*bareEvent
	awaited int
	refused error
}

// bareEvent is what a writer hands over, again and again: its own bytes, and
// where it waits.
type bareEvent struct {
	payload []byte
	done    chan error // of capacity 1
}

func openBare(ctx context.Context, dir string, size, writers int, syncAlways bool) (*bare, error) {
	b := &bare{
		stream: journal.StreamName("eu", planID, 0), writers: make([]bareEvent, writers),
		wake: make(chan struct{}, 1), quit: make(chan struct{}), ended: make(chan struct{}), answer: make(chan error, 1),
	}
	for w := range b.writers {
		b.writers[w] = bareEvent{make([]byte, size), make(chan error, 1)}
		rand.Read(b.writers[w].payload) // never fails; it ends the process instead
	}
	app := journal.NewAppID(3)
	for i := range journal.Buckets {
		b.subjects = append(b.subjects, journal.Subject{Plan: planID, App: app, Bucket: i}.String())
	}
	if err := b.open(ctx, dir, syncAlways); err != nil {
		close(b.ended)
		return nil, errors.Join(fmt.Errorf("open the bare stream: %w", err), b.close())
	}
	go b.run()
	return b, nil
}

func (b *bare) open(ctx context.Context, dir string, syncAlways bool) error {
	quiet := slog.New(slog.DiscardHandler)
	var err error
	if b.server, err = embedded.Start(ctx, embedded.Options{StoreDir: dir, SyncAlways: syncAlways, Log: quiet}); err != nil {
		return err
	}
	if b.conn, err = b.server.Connect(); err != nil {
		return err
	}
	if b.js, err = jetstream.New(b.conn); err != nil {
		return err
	}
	if _, err = b.js.CreateStream(ctx, jetstream.StreamConfig{
		Name: b.stream, Subjects: []string{journal.StreamSubjects(planID, 0)}, Storage: jetstream.FileStorage,
		MaxAge: 180 * 24 * time.Hour, AllowAtomicPublish: true, AllowMsgTTL: true, AllowDirect: true, Duplicates: time.Minute,
	}); err != nil {
		return err
	}
	if b.folder, err = os.Open(filepath.Join(b.server.StreamDir(b.stream), "msgs")); err != nil {
		return err
	}
	b.inbox = nats.NewInbox()
	if b.acks, err = b.conn.Subscribe(b.inbox, b.acknowledged); err != nil {
		return err
	}
	return b.acks.SetPendingLimits(-1, -1)
}

// way says how the bare stream is made durable.
func (b *bare) way() string {
	if b.server.Syncer() == nil {
		return "atomic batches of at most 1,000, synced by the server"
	}
	return "asynchronous publishes, all acknowledgements awaited, fdatasync of the block files"
}

func (b *bare) close() error {
	close(b.quit)
	<-b.ended
	if b.last != nil {
		_ = b.last.Close()
	}
	if b.folder != nil {
		_ = b.folder.Close()
	}
	if b.conn != nil {
		b.conn.Close()
	}
	if b.server != nil {
		return b.server.Close()
	}
	return nil
}

// append hands a writer's payload to the committer and waits for its commit,
// which the committer answers whatever happens: waiting for the context too
// would cost more.
func (b *bare) append(_ context.Context, w, _ int) error {
	e := &b.writers[w]
	b.mu.Lock()
	b.pending = append(b.pending, e)
	first := len(b.pending) == 1
	b.mu.Unlock()
	if first {
		select {
		case b.wake <- struct{}{}:
		default:
		}
	}
	return <-e.done
}

// publishOne publishes one payload and waits for the server's answer.
func (b *bare) publishOne(ctx context.Context, w, n int) error {
	_, err := b.js.Publish(ctx, b.subjects[(w+n)%len(b.subjects)], b.writers[w].payload)
	return err
}

func (b *bare) run() {
	defer close(b.ended)
	limit := bareCommit
	if b.server.Syncer() == nil {
		limit = bareBatch
	}
	var batch []*bareEvent
	for {
		b.mu.Lock()
		n := min(len(b.pending), limit)
		batch = append(batch[:0], b.pending[:n]...)
		b.pending = b.pending[:copy(b.pending, b.pending[n:])]
		b.mu.Unlock()
		if n == 0 {
			select {
			case <-b.wake:
				continue
			case <-b.quit:
				return
			}
		}
		err := b.commit(batch)
		for _, e := range batch {
			e.done <- err
		}
	}
}

func (b *bare) commit(batch []*bareEvent) error {
	if b.server.Syncer() == nil {
		return b.commitBatch(batch)
	}
	b.mu.Lock()
	b.awaited, b.refused = len(batch), nil
	b.mu.Unlock()
	for i, e := range batch {
		if err := b.conn.PublishRequest(b.subjects[i%len(b.subjects)], b.inbox, e.payload); err != nil {
			return err
		}
	}
	if err := <-b.answer; err != nil {
		return err
	}
	return b.sync()
}

func (b *bare) acknowledged(m *nats.Msg) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !bytes.HasPrefix(m.Data, []byte(`{"stream":`)) {
		b.refused = fmt.Errorf("the server refused a publish: %s", m.Data)
	}
	if b.awaited--; b.awaited == 0 {
		b.answer <- b.refused
	}
}

// commitBatch publishes an atomic batch (ADR 50 of NATS): one answer, when all
// of it is stored and synced.
func (b *bare) commitBatch(batch []*bareEvent) error {
	id := strconv.FormatInt(time.Now().UnixNano(), 36)
	b.mu.Lock()
	b.awaited, b.refused = 1, nil
	b.mu.Unlock()
	for i, e := range batch {
		m := &nats.Msg{Subject: b.subjects[i%len(b.subjects)], Data: e.payload, Header: nats.Header{}}
		m.Header.Set("Nats-Batch-Id", id)
		m.Header.Set("Nats-Batch-Sequence", strconv.Itoa(i+1))
		if i == len(batch)-1 {
			m.Header.Set("Nats-Batch-Commit", "1")
			m.Reply = b.inbox
		}
		if err := b.conn.PublishMsg(m); err != nil {
			return err
		}
	}
	return <-b.answer
}

// sync makes what was acknowledged durable.
func (b *bare) sync() error {
	added := false
	if b.last == nil {
		if err := b.findBlock(); err != nil {
			return err
		}
		added = true
	}
	for {
		if err := datasync(b.last); err != nil {
			return err
		}
		next, err := os.Open(b.blockName(b.block + 1))
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			return err
		}
		_ = b.last.Close()
		b.last, b.block, added = next, b.block+1, true
	}
	if added {
		return b.folder.Sync()
	}
	return nil
}

func (b *bare) blockName(n int) string {
	return filepath.Join(b.folder.Name(), strconv.Itoa(n)+".blk")
}

func (b *bare) findBlock() error {
	for n := 1; ; n++ {
		if !fileExists(b.blockName(n + 1)) {
			f, err := os.Open(b.blockName(n))
			b.last, b.block = f, n
			return err
		}
	}
}
