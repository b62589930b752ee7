package attachments

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json" // as the object store's client reads it
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
)

// Objects are written in the form of the NATS object store (ADR-20 of the NATS
// architecture), which its client reads, but not by its Put: that starts a
// goroutine for each upload which does not always end, and describes an object
// before its content is known to be whole.

// cleanTime is how long an upload that failed is cleaned up.
const cleanTime = 10 * time.Second

// object is one that is being written.
type object struct {
	info   jetstream.ObjectInfo
	chunks string // the subject of its chunks
	sum    hash.Hash
}

func newObject(bucket, name string) *object {
	id := nuid.Next()
	return &object{
		info: jetstream.ObjectInfo{
			ObjectMeta: jetstream.ObjectMeta{Name: name, Opts: &jetstream.ObjectMetaOptions{ChunkSize: sealedChunk}},
			Bucket:     bucket, NUID: id,
		},
		chunks: "$O." + bucket + ".C." + id, sum: sha256.New(),
	}
}

// publish stores the chunks that content gives, one at each Read, in their order.
func (s *Store) publish(ctx context.Context, o *object, content io.Reader) error {
	buffer := make([]byte, sealedChunk)
	for {
		n, err := content.Read(buffer)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		_, _ = o.sum.Write(buffer[:n]) // a hash never fails
		if _, err := s.cfg.JetStream.Publish(ctx, o.chunks, buffer[:n]); err != nil {
			return err
		}
		o.info.Chunks++
		o.info.Size += uint64(n) //nolint:gosec // not negative
	}
}

// publishInfo makes the chunks an object.
func (s *Store) publishInfo(ctx context.Context, o *object) error {
	o.info.Digest = "SHA-256=" + base64.URLEncoding.EncodeToString(o.sum.Sum(nil))
	data, err := json.Marshal(o.info)
	if err != nil {
		return fmt.Errorf("attachments: %w", err)
	}
	message := nats.NewMsg("$O." + o.info.Bucket + ".M." + base64.URLEncoding.EncodeToString([]byte(o.info.Name)))
	message.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	message.Data = data
	_, err = s.cfg.JetStream.PublishMsg(ctx, message)
	return err
}

// discard removes the chunks of an upload that failed. Those that it misses end
// with the stream's age limit; nothing leads to them.
func (s *Store) discard(ctx context.Context, o *object) error {
	if o.info.Chunks == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
	defer cancel()
	stream, err := s.cfg.JetStream.Stream(ctx, "OBJ_"+s.bucket)
	if err != nil {
		return s.failed(err)
	}
	return s.failed(stream.Purge(ctx, jetstream.WithPurgeSubject(o.chunks)))
}
