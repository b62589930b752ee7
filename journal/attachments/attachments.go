// Package attachments keeps the attachments of messages: sealed in chunks in the
// region's JetStream object store, streamed in and out, and gone when their
// retention ends, when their uploader is erased, or when their app ends.
//
// What it promises: an upload that was acknowledged is on disk, and is given
// out whole and unchanged or not at all. A chunk is opened before a byte of it
// leaves; one that was cut off, exchanged or moved is refused. An interrupted
// upload leaves nothing that can be read. Memory is one chunk for each
// transfer, whatever the size.
//
// docs/format/attachments.md is normative.
package attachments

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// Errors that callers branch on. Those of package kms come through as they are:
// kms.ErrSubjectErased for an uploader who was erased, for instance.
var (
	// ErrNotFound means that there is no such attachment, or none any more.
	ErrNotFound = errors.New("attachments: not found")
	// ErrConflict means that the id is taken by another content. Use another.
	ErrConflict = errors.New("attachments: the id is taken by another content")
	// ErrTooLarge means that the content is over the limit. Send less.
	ErrTooLarge = errors.New("attachments: over the limit")
	// ErrDigest means that what arrived is not what its digest says. Nothing was
	// stored; send it again.
	ErrDigest = errors.New("attachments: the content is not what its digest says")
	// ErrCorrupt means that what is stored is damaged. An operator must look.
	ErrCorrupt = errors.New("attachments: damaged")
)

const (
	// ChunkSize is the number of bytes that are sealed together.
	ChunkSize = 64 << 10

	class         = "attachments/0"
	epochsPerLife = 14
	manifestKey   = "coffer" // of the object's metadata
	formVersion   = 1
)

// Config says what a [Store] works on.
type Config struct {
	Journal *journal.Journal
	// JetStream is a client of the region's server.
	JetStream jetstream.JetStream
	// Sync makes what is stored survive a power cut; nil when the server does.
	Sync journal.Syncer
	// Limit is the largest content in bytes; 0 means 10 MiB.
	Limit int64
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

// Store keeps the attachments of a region. Its methods may be called
// concurrently.
type Store struct {
	cfg    Config
	bucket string

	mu      sync.Mutex
	objects jetstream.ObjectStore // opened when first needed
	busy    map[string]chan struct{}
}

// New returns the store of the journal's region. It asks the server nothing.
func New(cfg Config) *Store {
	if cfg.Limit <= 0 {
		cfg.Limit = 10 << 20
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Store{cfg: cfg, bucket: journal.AttachmentBucket(cfg.Journal.Region().ID), busy: make(map[string]chan struct{})}
}

// Limit returns the largest content in bytes.
func (s *Store) Limit() int64 { return s.cfg.Limit }

// Info is what is known of an attachment.
type Info struct {
	ID           string
	Size         int64
	Digest       [sha256.Size]byte
	Media        string // its media type, as the uploader gave it
	Conversation string
	Sender       string // the uploader; empty for the app itself
	Stored       time.Time
}

// manifest is the sealed description, see docs/format/attachments.md.
type manifest struct {
	Version      int       `json:"version"`
	ID           string    `json:"id"`
	Upload       []byte    `json:"upload"`
	Size         int64     `json:"size"`
	Digest       []byte    `json:"digest"`
	Media        string    `json:"media,omitempty"`
	Conversation string    `json:"conversation,omitempty"`
	Sender       string    `json:"sender,omitempty"`
	Stored       time.Time `json:"stored"`
}

func (m manifest) info() Info {
	return Info{
		ID: m.ID, Size: m.Size, Digest: [sha256.Size]byte(m.Digest), Media: m.Media,
		Conversation: m.Conversation, Sender: m.Sender, Stored: m.Stored,
	}
}

// place names an attachment where ids may not stand.
type place struct {
	app journal.AppID
	tag kms.Tag
}

func (p place) name() string { return p.app.String() + "/" + p.tag.String() }

func (s *Store) place(ctx context.Context, app journal.AppID, id string) (place, error) {
	tag, err := s.cfg.Journal.Tag(ctx, app, "attachment", id)
	return place{app: app, tag: tag}, err
}

// store opens the object store. The journal has made its stream.
func (s *Store) store(ctx context.Context) (jetstream.ObjectStore, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.objects == nil {
		objects, err := s.cfg.JetStream.ObjectStore(ctx, s.bucket)
		if err != nil {
			return nil, fmt.Errorf("attachments: %w: %w", journal.ErrUnavailable, err)
		}
		s.objects = objects
	}
	return s.objects, nil
}

// lock lets one writer of an attachment through at a time.
func (s *Store) lock(ctx context.Context, name string) (unlock func(), err error) {
	for {
		s.mu.Lock()
		taken, busy := s.busy[name]
		if !busy {
			mine := make(chan struct{})
			s.busy[name] = mine
			s.mu.Unlock()
			return func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				delete(s.busy, name)
				close(mine)
			}, nil
		}
		s.mu.Unlock()
		select {
		case <-taken:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// An Upload describes a content that is to be stored.
type Upload struct {
	ID           string
	Media        string
	Conversation string
	Sender       string
	// Digest is the SHA-256 that the content must have; nil if its sender did
	// not say.
	Digest []byte
}

// Put stores what content gives until io.EOF, and returns once it is on disk.
// Any other error of content ends the upload and leaves nothing. The same
// content under the same id again is no error: created is false then.
func (s *Store) Put(ctx context.Context, app journal.AppID, u Upload, content io.Reader) (info Info, created bool, err error) {
	p, err := s.place(ctx, app, u.ID)
	if err != nil {
		return Info{}, false, err
	}
	subject, err := s.cfg.Journal.Tag(ctx, app, "subject", u.Sender)
	if err != nil {
		return Info{}, false, err
	}
	unlock, err := s.lock(ctx, p.name())
	if err != nil {
		return Info{}, false, err
	}
	defer unlock()
	now := s.cfg.Now().UTC().Truncate(time.Millisecond)
	m := manifest{
		Version: formVersion, ID: u.ID, Upload: make([]byte, 16), Media: u.Media, Conversation: u.Conversation, Sender: u.Sender, Stored: now,
	}
	_, _ = rand.Read(m.Upload) // never fails, it ends the process
	in := &bounded{in: content, left: s.cfg.Limit, sum: sha256.New()}
	old, _, err := s.manifest(ctx, p)
	switch {
	case err == nil:
		return s.again(old, u, in)
	case !errors.Is(err, ErrNotFound):
		return Info{}, false, err
	}
	seal := &sealer{
		in: in, aad: newChunkAAD(s.cfg.Journal.Region().ID, p, m.Upload),
		key: func() (*kms.DataKey, error) {
			return s.cfg.Journal.Keyring().Sealer(ctx, app.String(), s.epoch(now), subject)
		},
	}
	object := newObject(s.bucket, p.name())
	err = s.publish(ctx, object, seal)
	if err == nil {
		m.Size, m.Digest = in.size, in.sum.Sum(nil)
		err = in.check(u.Digest)
	}
	if err == nil {
		err = s.describe(ctx, object, p, seal, m)
	}
	if err != nil {
		return Info{}, false, errors.Join(s.failed(err), s.discard(ctx, object))
	}
	return m.info(), true, nil
}

// describe puts the manifest beside the chunks, once these are on disk.
func (s *Store) describe(ctx context.Context, object *object, p place, seal *sealer, m manifest) error {
	if err := s.sync(); err != nil {
		return err
	}
	encoded, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("attachments: %w", err)
	}
	key, err := seal.key()
	if err != nil {
		return err
	}
	sealed := key.Seal(nil, manifestAAD(s.cfg.Journal.Region().ID, p), encoded)
	object.info.Metadata = map[string]string{manifestKey: base64.StdEncoding.EncodeToString(sealed)}
	if err := s.publishInfo(ctx, object); err != nil {
		return err
	}
	return s.sync()
}

// again answers an upload of an id that is taken: the whole content has to
// arrive before anything can be said.
func (s *Store) again(old manifest, u Upload, in *bounded) (Info, bool, error) {
	if _, err := io.Copy(io.Discard, in); err != nil {
		return Info{}, false, s.failed(err)
	}
	if err := in.check(u.Digest); err != nil {
		return Info{}, false, err
	}
	same := [sha256.Size]byte(in.sum.Sum(nil)) == [sha256.Size]byte(old.Digest) && u.Media == old.Media &&
		u.Conversation == old.Conversation && u.Sender == old.Sender
	if !same {
		return Info{}, false, ErrConflict
	}
	return old.info(), false, nil
}

// Info returns what is known of an attachment.
func (s *Store) Info(ctx context.Context, app journal.AppID, id string) (Info, error) {
	p, err := s.place(ctx, app, id)
	if err != nil {
		return Info{}, err
	}
	m, _, err := s.manifest(ctx, p)
	if err != nil {
		return Info{}, err
	}
	return m.info(), nil
}

// Delete removes an attachment; one that is not there is [ErrNotFound].
func (s *Store) Delete(ctx context.Context, app journal.AppID, id string) error {
	p, err := s.place(ctx, app, id)
	if err != nil {
		return err
	}
	unlock, err := s.lock(ctx, p.name())
	if err != nil {
		return err
	}
	defer unlock()
	objects, err := s.store(ctx)
	if err != nil {
		return err
	}
	if _, err := objects.GetInfo(ctx, p.name()); err != nil {
		return s.failed(err)
	}
	if err := s.failed(objects.Delete(ctx, p.name())); err != nil {
		return err
	}
	return s.sync()
}

// DeleteApp removes the attachments of an app, whose keys may be gone already,
// and returns how many there were. It looks at the names of all attachments of
// the region.
func (s *Store) DeleteApp(ctx context.Context, app journal.AppID) (int, error) {
	names, err := s.names(ctx, app)
	if err != nil || len(names) == 0 {
		return 0, err
	}
	objects, err := s.store(ctx)
	if err != nil {
		return 0, err
	}
	for i, name := range names {
		if err := s.failed(objects.Delete(ctx, name)); err != nil && !errors.Is(err, ErrNotFound) {
			return i, err
		}
	}
	return len(names), s.sync()
}

// CountApp returns how many attachments [Store.DeleteApp] would remove.
func (s *Store) CountApp(ctx context.Context, app journal.AppID) (int, error) {
	names, err := s.names(ctx, app)
	return len(names), err
}

func (s *Store) names(ctx context.Context, app journal.AppID) ([]string, error) {
	objects, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	all, err := objects.List(ctx)
	if errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil, nil
	}
	if err != nil {
		return nil, s.failed(err)
	}
	var names []string
	for _, object := range all {
		if strings.HasPrefix(object.Name, app.String()+"/") {
			names = append(names, object.Name)
		}
	}
	return names, nil
}

// manifest loads and opens the manifest of an attachment that is still kept.
func (s *Store) manifest(ctx context.Context, p place) (manifest, *jetstream.ObjectInfo, error) {
	objects, err := s.store(ctx)
	if err != nil {
		return manifest{}, nil, err
	}
	object, err := objects.GetInfo(ctx, p.name())
	if err != nil {
		return manifest{}, nil, s.failed(err)
	}
	text, ok := object.Metadata[manifestKey]
	if !ok {
		return manifest{}, nil, ErrNotFound // no attachment
	}
	sealed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return manifest{}, nil, fmt.Errorf("%w: a manifest is not base64", ErrCorrupt)
	}
	encoded, err := s.open(ctx, p, nil, manifestAAD(s.cfg.Journal.Region().ID, p), sealed)
	if err != nil {
		return manifest{}, nil, err
	}
	var m manifest
	if err := json.Unmarshal(encoded, &m); err != nil || m.Version != formVersion || len(m.Digest) != sha256.Size || len(m.Upload) != 16 || m.Size < 0 {
		return manifest{}, nil, fmt.Errorf("%w: a manifest cannot be read", ErrCorrupt)
	}
	if !s.cfg.Now().Before(m.Stored.Add(s.cfg.Journal.Retention().Attachments)) {
		return manifest{}, nil, ErrNotFound
	}
	return m, object, nil
}

func (s *Store) open(ctx context.Context, p place, dst, aad, sealed []byte) ([]byte, error) {
	header, err := kms.ParseHeader(sealed)
	if err != nil {
		return nil, err
	}
	key, err := s.cfg.Journal.Keyring().Opener(ctx, p.app.String(), header.Epoch, header.Subject)
	if err != nil {
		return nil, err
	}
	return key.Open(dst, aad, sealed)
}

// epoch cuts the key epochs of attachments.
func (s *Store) epoch(at time.Time) kms.Epoch {
	life := s.cfg.Journal.Retention().Attachments
	length := max(life/epochsPerLife/time.Second, 1)
	from := time.Unix(at.Unix()/int64(length)*int64(length), 0).UTC()
	until := from.Add(length * time.Second)
	return kms.Epoch{Class: class, From: from, Until: until, Expires: until.Add(life)}
}

func (s *Store) sync() error {
	if s.cfg.Sync == nil {
		return nil
	}
	if err := s.cfg.Sync.Sync("OBJ_" + s.bucket); err != nil {
		return fmt.Errorf("attachments: %w: %w", journal.ErrUnavailable, err)
	}
	return nil
}

// readFailure returns the error of the content behind an error, if it is one.
func readFailure(err error) error {
	if read, ok := errors.AsType[*readError](err); ok {
		return read.err
	}
	return nil
}

// failed sorts an error of the object store.
func (s *Store) failed(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, jetstream.ErrObjectNotFound):
		return ErrNotFound
	}
	if err := readFailure(err); err != nil {
		return err
	}
	return fmt.Errorf("attachments: %w: %w", journal.ErrUnavailable, err)
}
