package embedded

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// scratchStream is the stream of the self-test. It stays, with less than 100 kB:
// while a stream is being removed, the server removes the folder of all streams
// too if it is empty just then, and another one that is being made fails.
const scratchStream = "coffer_selftest"

// selfTest tries on a scratch stream what syncs of our own rely on, and returns
// what does not hold. It takes a few milliseconds.
func selfTest(ctx context.Context, s *Server, syncer *Syncer) error {
	nc, err := s.Connect(nats.NoReconnect())
	if err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	// A limit this low makes the smallest blocks, 32 kB, so that a few messages
	// fill one.
	stream, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name: scratchStream, Subjects: []string{scratchStream}, Storage: jetstream.FileStorage,
		MaxBytes: 96 << 10, Replicas: 1,
	})
	if err != nil {
		return fmt.Errorf("self-test: create the scratch stream: %w", err)
	}
	defer syncer.forget(scratchStream)
	if err := checkAppends(ctx, js, syncer, s.StreamDir(scratchStream)); err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	if err := checkErase(ctx, js, stream, syncer, s.StreamDir(scratchStream)); err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	if err := syncer.SyncMeta(scratchStream); err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	return nil
}

func canary(size int) []byte {
	b := make([]byte, size)
	rand.Read(b) // never fails; it ends the process instead
	return b
}

// checkAppends fills more than one block and looks, after each
// acknowledgement, for the message's bytes in the block that the Syncer follows.
func checkAppends(ctx context.Context, js jetstream.JetStream, syncer *Syncer, dir string) error {
	first, rolled := 0, false
	for range 8 {
		payload := canary(8 << 10)
		if _, err := js.Publish(ctx, scratchStream, payload); err != nil {
			return fmt.Errorf("publish: %w", err)
		}
		if err := syncer.Sync(scratchStream); err != nil {
			return err
		}
		b := syncer.of(scratchStream)
		b.mu.Lock()
		path := b.path(b.index)
		if first == 0 {
			first = b.index
		}
		rolled = rolled || b.index > first
		b.mu.Unlock()
		if err := contains(path, payload, true); err != nil {
			return fmt.Errorf("an acknowledged message: %w", err)
		}
		if _, err := os.Stat(filepath.Join(dir, "msgs", filepath.Base(path))); err != nil {
			return fmt.Errorf("the last block: %w", err)
		}
	}
	if !rolled {
		return errors.New("no second block was found after 64 KiB")
	}
	return nil
}

// checkErase rewrites the last block and looks whether the Syncer notices.
func checkErase(ctx context.Context, js jetstream.JetStream, stream jetstream.Stream, syncer *Syncer, dir string) error {
	secret := canary(512)
	ack, err := js.Publish(ctx, scratchStream, secret)
	if err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	// Erasing the only message of a block would remove the block instead.
	if _, err := js.Publish(ctx, scratchStream, canary(512)); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	if err := syncer.Sync(scratchStream); err != nil {
		return err
	}
	if err := stream.SecureDeleteMsg(ctx, ack.Sequence); err != nil {
		return fmt.Errorf("erase: %w", err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "msgs", "*.blk"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := contains(f, secret, false); err != nil {
			return fmt.Errorf("an erased message: %w", err)
		}
	}
	payload := canary(512)
	if _, err := js.Publish(ctx, scratchStream, payload); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	if err := syncer.Sync(scratchStream); err != nil {
		return err
	}
	b := syncer.of(scratchStream)
	b.mu.Lock()
	defer b.mu.Unlock()
	open, err := b.last.Stat()
	if err != nil {
		return err
	}
	byPath, err := os.Stat(b.path(b.index))
	if err != nil {
		return err
	}
	if !os.SameFile(open, byPath) {
		return errors.New("a rewritten block was not noticed")
	}
	if err := contains(b.path(b.index), payload, true); err != nil {
		return fmt.Errorf("an acknowledged message after a rewrite: %w", err)
	}
	return nil
}

func contains(path string, payload []byte, want bool) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	switch has := bytes.Contains(content, payload); {
	case want && !has:
		return fmt.Errorf("its bytes are not in %s", filepath.Base(path))
	case !want && has:
		return fmt.Errorf("its bytes are still in %s", filepath.Base(path))
	}
	return nil
}
