package attachments

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

const (
	sealedChunk = ChunkSize + kms.Overhead

	// transferTime is how long reading one attachment may take.
	transferTime = time.Hour
)

// readError is an error of the content, told apart from those of the store.
type readError struct{ err error }

func (e *readError) Error() string { return e.err.Error() }
func (e *readError) Unwrap() error { return e.err }

// bounded counts and sums a content, and ends it at the limit.
type bounded struct {
	in   io.Reader
	left int64
	size int64
	sum  hash.Hash
}

func (b *bounded) Read(p []byte) (int, error) {
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.in.Read(p)
	b.left -= int64(n)
	b.size += int64(n)
	if b.left < 0 {
		return 0, &readError{ErrTooLarge}
	}
	_, _ = b.sum.Write(p[:n]) // a hash never fails
	if err != nil && !errors.Is(err, io.EOF) {
		err = &readError{err}
	}
	return n, err
}

func (b *bounded) check(digest []byte) error {
	if digest != nil && !bytes.Equal(digest, b.sum.Sum(nil)) {
		return ErrDigest
	}
	return nil
}

// chunkAAD is the additional data of the chunks of one upload.
type chunkAAD struct{ prefix []byte }

func lp(dst, part []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(part))) //nolint:gosec // short
	return append(dst, part...)
}

func header(purpose, region string, p place) []byte {
	aad := lp(nil, []byte(purpose))
	aad = lp(aad, []byte(region))
	aad = lp(aad, []byte(p.app.String()))
	return lp(aad, p.tag[:])
}

func newChunkAAD(region string, p place, upload []byte) chunkAAD {
	return chunkAAD{prefix: lp(header("coffer/v1 attachment", region, p), upload)}
}

func manifestAAD(region string, p place) []byte {
	return header("coffer/v1 attachment manifest", region, p)
}

func (a chunkAAD) of(index uint64, last bool) []byte {
	aad := binary.BigEndian.AppendUint64(slices.Clip(a.prefix), index)
	if last {
		return append(aad, 1)
	}
	return append(aad, 0)
}

// sealer reads a content and gives its sealed chunks, one at each Read.
type sealer struct {
	in  io.Reader
	aad chunkAAD
	key func() (*kms.DataKey, error)

	index uint64
	next  []byte // the chunk after the present one: whether this is the last shows only then
	begun bool
	done  bool
}

// Read seals the next chunk into p, which must have room for a whole one.
func (s *sealer) Read(p []byte) (int, error) {
	if s.done {
		return 0, io.EOF
	}
	if len(p) < sealedChunk {
		return 0, io.ErrShortBuffer
	}
	if !s.begun {
		s.begun = true
		var err error
		if s.next, err = fill(s.in, make([]byte, ChunkSize)); err != nil {
			return 0, err
		}
	}
	present := s.next
	s.done = len(present) < ChunkSize
	if !s.done {
		var err error
		if s.next, err = fill(s.in, make([]byte, ChunkSize)); err != nil {
			return 0, err
		}
		s.done = len(s.next) == 0
	}
	key, err := s.key()
	if err != nil {
		return 0, &readError{err}
	}
	sealed := key.Seal(p[:0], s.aad.of(s.index, s.done), present)
	s.index++
	return len(sealed), nil
}

// fill reads until the buffer is full or the content ends.
func fill(in io.Reader, buffer []byte) ([]byte, error) {
	n, err := io.ReadFull(in, buffer)
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) && !isReadError(err) {
		return buffer[:n], nil
	}
	return nil, err
}

// isReadError tells a content that ended early, by its own account, from one
// that ended inside a chunk.
func isReadError(err error) bool {
	var read *readError
	return errors.As(err, &read)
}

// Content gives the bytes of an attachment. It is an [io.ReadSeeker] for ranges;
// seeking costs nothing, and the next Read opens only the chunks that it needs.
// It is used by one goroutine and must be closed.
type Content struct {
	Info

	ctx   context.Context //nolint:containedctx // of the request that reads
	end   context.CancelFunc
	store *Store
	place place
	aad   chunkAAD

	offset int64
	stream io.ReadCloser // of sealed chunks; nil before the first Read
	index  uint64        // of the chunk that the stream gives next
	sealed []byte
	plain  []byte // of chunk index-1
}

// Open begins to read an attachment, on behalf of ctx.
func (s *Store) Open(ctx context.Context, app journal.AppID, id string) (*Content, error) {
	p, err := s.place(ctx, app, id)
	if err != nil {
		return nil, err
	}
	m, object, err := s.manifest(ctx, p)
	if err != nil {
		return nil, err
	}
	if object.Chunks != uint32(chunks(m.Size)) { //nolint:gosec // of a limited size
		return nil, fmt.Errorf("%w: %d chunks instead of %d", ErrCorrupt, object.Chunks, chunks(m.Size))
	}
	// A client that gets no deadline takes one of its own, which is too short for
	// a slow reader.
	ctx, end := context.WithTimeout(ctx, transferTime)
	return &Content{Info: m.info(), ctx: ctx, end: end, store: s, place: p, aad: newChunkAAD(s.cfg.Journal.Region().ID, p, m.Upload)}, nil
}

// chunks is how many chunks a content has.
func chunks(size int64) int64 { return max((size+ChunkSize-1)/ChunkSize, 1) }

// Seek sets where the next Read begins.
func (c *Content) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += c.offset
	case io.SeekEnd:
		offset += c.Size
	}
	if offset < 0 {
		return 0, fmt.Errorf("%w: before the beginning", ErrCorrupt)
	}
	c.offset = offset
	return offset, nil
}

// Read gives opened bytes.
func (c *Content) Read(p []byte) (int, error) {
	if c.offset >= c.Size {
		return 0, io.EOF
	}
	want := uint64(c.offset / ChunkSize) //nolint:gosec // not negative
	for c.stream == nil || c.index != want+1 {
		if err := c.advance(want); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.plain[c.offset%ChunkSize:])
	c.offset += int64(n)
	return n, nil
}

// advance reads the next chunk, and opens it if it is the one that is wanted.
func (c *Content) advance(want uint64) error {
	if c.stream != nil && c.index > want { // behind: begin again
		_ = c.stream.Close() // nothing of it is used any more
		c.stream = nil
	}
	if c.stream == nil {
		objects, err := c.store.store(c.ctx)
		if err != nil {
			return err
		}
		stream, err := objects.Get(c.ctx, c.place.name())
		if err != nil {
			return c.store.failed(err)
		}
		c.stream, c.index, c.sealed = stream, 0, make([]byte, sealedChunk)
	}
	last := c.index == uint64(chunks(c.Size))-1 //nolint:gosec // not negative
	length := int64(ChunkSize)
	if last {
		length = c.Size - int64(c.index)*ChunkSize //nolint:gosec // of a limited size
	}
	sealed := c.sealed[:length+kms.Overhead]
	if _, err := io.ReadFull(c.stream, sealed); err != nil {
		return fmt.Errorf("%w: it ends early: %w", ErrCorrupt, err)
	}
	c.index++
	if c.index != want+1 {
		return nil
	}
	plain, err := c.store.open(c.ctx, c.place, c.plain[:0], c.aad.of(want, last), sealed)
	c.plain = plain
	return err
}

// Close ends the reading.
func (c *Content) Close() error {
	defer c.end()
	if c.stream == nil {
		return nil
	}
	err := c.stream.Close()
	c.stream = nil
	return err
}
