package journal

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/cofferdb/coffer/kms"
)

const (
	// streamsRow is the registry's row with the log id and the incarnation of
	// every stream.
	streamsRow = "streams"

	// recordRoom is what a record may be larger than its event's JSON: header,
	// envelope and message headers.
	recordRoom = 4 << 10
)

// streamsRecord is the value of streamsRow.
type streamsRecord struct {
	Log     string            `json:"log"`
	Streams map[string]string `json:"streams"` // name → incarnation
}

// streamState is a stream as it was found or made.
type streamState struct {
	info StreamInfo
	last uint64
}

// checkServer refuses servers before 2.15.1, which leak memory in their TTL
// wheel and whose atomic batches were not examined.
func checkServer(nc *nats.Conn) error {
	version := nc.ConnectedServerVersion()
	var n [3]int
	parts := strings.SplitN(strings.SplitN(version, "-", 2)[0], ".", 3)
	for i := range n {
		if i < len(parts) {
			n[i], _ = strconv.Atoi(parts[i]) // what does not parse counts as 0 and is refused
		}
	}
	if slices.Compare(n[:], []int{2, 15, 1}) < 0 {
		return fmt.Errorf("%w: NATS server %q, at least 2.15.1 is needed", ErrUnavailable, version)
	}
	return nil
}

// wantedStreams returns the configuration of every stream of the region. How
// long each keeps its messages is the retention table's to say.
func (j *Journal) wantedStreams() (map[string]jetstream.StreamConfig, error) {
	limit := j.cfg.Limits.withDefaults().Bytes + recordRoom
	want := make(map[string]jetstream.StreamConfig)
	base := jetstream.StreamConfig{
		Storage: jetstream.FileStorage, Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld,
		Replicas: j.cfg.Replicas, MaxMsgSize: int32(min(limit, 1<<30)), //nolint:gosec // bounded
		AllowAtomicPublish: true, AllowMsgTTL: true, AllowDirect: direct(j.cfg.Replicas),
		// The server refuses a window longer than MaxAge, and keeps none when
		// no message has an id.
		Duplicates: time.Minute,
	}
	for _, p := range j.cfg.Plans {
		for shard := range p.shards() {
			c := base
			c.Name = StreamName(j.region.ID, p.ID, shard)
			c.Subjects = []string{StreamSubjects(p.ID, shard)}
			want[c.Name] = c
		}
	}
	for _, c := range j.callbacks.wanted(base) {
		want[c.Name] = c
	}
	audit := base
	audit.Name = AuditStream(j.region.ID)
	audit.Subjects = []string{"audit.>"}
	want[audit.Name] = audit
	monitoring := base
	monitoring.Name = MonitoringStream(j.region.ID)
	monitoring.Subjects = []string{"mon.*"}
	want[monitoring.Name] = monitoring
	for _, bucket := range []string{RegistryBucket(j.region.ID), KeyringBucket(j.region.ID), ProfileBucket(j.region.ID)} {
		c := bucketConfig(bucket, j.cfg.Replicas)
		want[c.Name] = c
	}
	attachments := objectsConfig(AttachmentBucket(j.region.ID), j.cfg.Replicas)
	want[attachments.Name] = attachments
	table := j.RetentionTable()
	for name, c := range want {
		age, ok := MaxAge(table, name)
		if !ok {
			return nil, fmt.Errorf("%w: stream %s has no row in the retention table", ErrInvalid, name)
		}
		c.MaxAge = age
		if age > 0 {
			c.Duplicates = min(c.Duplicates, age)
		}
		want[name] = c
	}
	return want, nil
}

// bucketRevisions is how many revisions of a row can be there: the present one,
// and those whose erasure was interrupted. A revision that the server drops by
// this limit is not overwritten, so there must be room for a few.
const bucketRevisions = 8

// bucketConfig is a KV bucket as clients make it, but for two things: messages
// can be deleted, and old revisions are kept until they have been erased. A
// bucket made by the client denies deletion (error 10057), and its old
// revisions stay in the block file.
func bucketConfig(bucket string, replicas int) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: "KV_" + bucket, Subjects: []string{"$KV." + bucket + ".>"},
		Storage: jetstream.FileStorage, Discard: jetstream.DiscardNew, Replicas: replicas,
		MaxMsgsPerSubject: bucketRevisions, MaxMsgSize: -1, MaxBytes: -1, MaxMsgs: -1,
		AllowRollup: true, DenyDelete: false, AllowMsgTTL: true, AllowDirect: direct(replicas),
		Duplicates: 2 * time.Minute,
	}
}

// direct reports whether messages may be got past the leader. Any server that
// has a copy answers then, also one that is behind, and a message that was
// acknowledged would be said to be missing: a read must see every write that
// had returned before.
func direct(replicas int) bool { return replicas <= 1 }

// objectsConfig is an object store as clients make it.
func objectsConfig(bucket string, replicas int) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: "OBJ_" + bucket, Subjects: []string{"$O." + bucket + ".C.>", "$O." + bucket + ".M.>"},
		Storage: jetstream.FileStorage, Discard: jetstream.DiscardNew, Replicas: replicas,
		MaxMsgSize: -1, MaxBytes: -1, MaxMsgs: -1, AllowRollup: true, AllowDirect: direct(replicas),
		Duplicates: time.Minute,
	}
}

// openStreams finds or makes the region's streams and returns those of
// messages, in the order of the plan table, and then those of callbacks, whose
// plan is empty.
func (j *Journal) openStreams(ctx context.Context) ([]streamState, error) {
	want, err := j.wantedStreams()
	if err != nil {
		return nil, err
	}
	found, err := j.findStreams(ctx, slices.Sorted(maps.Keys(want)))
	if err != nil {
		return nil, err
	}
	registryStream := "KV_" + RegistryBucket(j.region.ID)
	if found[registryStream] == nil {
		// Without a registry nothing tells what else there should be. With no
		// stream at all this is a region's first start; with some it is damage.
		for name := range found {
			return nil, fmt.Errorf("%w: stream %s is missing while %s is there", ErrIncarnation, registryStream, name)
		}
		info, err := j.createStream(ctx, want[registryStream])
		if err != nil {
			return nil, err
		}
		found[registryStream] = info
	}
	j.rows = NewRows(j.js, RegistryBucket(j.region.ID), j.cfg.Sync)
	record, revision, err := j.loadStreamsRecord(ctx)
	if err != nil {
		return nil, err
	}
	if err := j.reconcile(ctx, want, found, &record, revision); err != nil {
		return nil, err
	}
	log, err := hex.DecodeString(record.Log)
	if err != nil || len(log) != len(j.logID) {
		return nil, fmt.Errorf("registry row %q: %w: the log id", streamsRow, ErrCorrupt)
	}
	j.logID = LogID(log)
	var out []streamState
	for _, p := range j.cfg.Plans {
		for shard := range p.shards() {
			name := StreamName(j.region.ID, p.ID, shard)
			out = append(out, streamState{
				info: StreamInfo{Name: name, Plan: p.ID, Shard: shard, Incarnation: record.Streams[name]},
				last: found[name].State.LastSeq,
			})
		}
	}
	for shard := range callbackShards {
		name := CallbackStream(j.region.ID, shard)
		out = append(out, streamState{
			info: StreamInfo{Name: name, Shard: shard, Incarnation: record.Streams[name]}, last: found[name].State.LastSeq,
		})
	}
	return out, nil
}

func (j *Journal) findStreams(ctx context.Context, names []string) (map[string]*jetstream.StreamInfo, error) {
	found := make(map[string]*jetstream.StreamInfo)
	var mu sync.Mutex // guards found
	group, ctx := errgroup.WithContext(ctx)
	for _, name := range names {
		group.Go(func() error {
			err := retry(ctx, func(ctx context.Context) error {
				s, err := j.js.Stream(ctx, name)
				if err == nil {
					mu.Lock()
					defer mu.Unlock()
					found[name] = s.CachedInfo()
				} else if !errors.Is(err, jetstream.ErrStreamNotFound) {
					return unavailable(err)
				}
				return nil
			})
			if err != nil {
				return fmt.Errorf("look for stream %s: %w", name, err)
			}
			return nil
		})
	}
	return found, group.Wait()
}

// presentStreams returns those of the region's streams that are there.
func (j *Journal) presentStreams(ctx context.Context) (map[string]*jetstream.StreamInfo, error) {
	want, err := j.wantedStreams()
	if err != nil {
		return nil, err
	}
	return j.findStreams(ctx, slices.Sorted(maps.Keys(want)))
}

func (j *Journal) loadStreamsRecord(ctx context.Context) (streamsRecord, uint64, error) {
	row, err := j.rows.Load(ctx, streamsRow)
	if errors.Is(err, kms.ErrRowNotFound) {
		return streamsRecord{Log: randomID(), Streams: map[string]string{}}, 0, nil
	}
	if err != nil {
		return streamsRecord{}, 0, err
	}
	var record streamsRecord
	if err := json.Unmarshal(row.Value, &record); err != nil {
		return streamsRecord{}, 0, fmt.Errorf("registry row %q: %w: %w", streamsRow, ErrCorrupt, err)
	}
	if record.Streams == nil {
		record.Streams = map[string]string{}
	}
	return record, row.Revision, nil
}

func randomID() string {
	var id [16]byte
	rand.Read(id[:]) // never fails; it ends the process instead
	return hex.EncodeToString(id[:])
}

// reconcile holds what was found against what is registered, makes what is new,
// and registers it.
//
// A stream that is registered and missing, or registered with another
// incarnation, is an error. One that is there and not registered was made by a
// start that did not get as far as registering it, if it never held a message;
// otherwise the registry is an older copy, which is an error too.
func (j *Journal) reconcile(ctx context.Context, want map[string]jetstream.StreamConfig, found map[string]*jetstream.StreamInfo, record *streamsRecord, revision uint64) error {
	names := slices.Sorted(maps.Keys(want))
	registryStream := "KV_" + RegistryBucket(j.region.ID)
	var missing []string
	for _, name := range names {
		registered, info := record.Streams[name], found[name]
		switch {
		case registered == "" && info == nil:
			missing = append(missing, name)
		case registered == "":
			if info.State.LastSeq > 0 && name != registryStream {
				return fmt.Errorf("%w: stream %s holds messages and is not registered", ErrIncarnation, name)
			}
		case info == nil:
			return fmt.Errorf("%w: stream %s is missing", ErrIncarnation, name)
		case info.Config.Metadata[IncarnationKey] != registered:
			return fmt.Errorf("%w: stream %s has incarnation %q, registered is %q", ErrIncarnation, name, info.Config.Metadata[IncarnationKey], registered)
		}
	}
	group, gctx := errgroup.WithContext(ctx)
	var mu sync.Mutex // guards found
	for _, name := range missing {
		group.Go(func() error {
			info, err := j.createStream(gctx, want[name])
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			found[name] = info
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	changed := revision == 0
	for _, name := range names {
		if record.Streams[name] == "" {
			record.Streams[name] = found[name].Config.Metadata[IncarnationKey]
			changed = true
		}
	}
	if !changed {
		return nil
	}
	value, err := json.Marshal(record, json.Deterministic(true))
	if err != nil {
		return fmt.Errorf("registry row %q: %w", streamsRow, err)
	}
	if revision == 0 {
		_, err = j.rows.Create(ctx, streamsRow, value)
	} else {
		_, err = j.rows.Update(ctx, streamsRow, value, revision)
	}
	if err != nil {
		return fmt.Errorf("register the streams: %w", err)
	}
	return nil
}

func (j *Journal) createStream(ctx context.Context, c jetstream.StreamConfig) (*jetstream.StreamInfo, error) {
	c.Metadata = map[string]string{IncarnationKey: randomID()}
	s, err := j.js.CreateStream(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("create stream %s: %w", c.Name, unavailable(err))
	}
	if j.cfg.Sync != nil {
		if err := j.cfg.Sync.SyncMeta(c.Name); err != nil {
			return nil, fmt.Errorf("create stream %s: %w", c.Name, err)
		}
	}
	return s.CachedInfo(), nil
}

// A Drift is a difference between a stream on the server and what the plan
// table asks for.
type Drift struct {
	Stream string
	// Field is "missing", "incarnation", "max_age", "max_msg_size", "replicas",
	// "subjects", "atomic_publish", "allow_direct" or "deny_delete".
	Field      string
	Want, Have string
}

// Check compares the region's streams with the plan table and the registry, and
// returns what differs. It changes nothing.
func (j *Journal) Check(ctx context.Context) ([]Drift, error) {
	record, _, err := j.loadStreamsRecord(ctx)
	if err != nil {
		return nil, err
	}
	want, err := j.wantedStreams()
	if err != nil {
		return nil, err
	}
	names := slices.Sorted(maps.Keys(want))
	found, err := j.findStreams(ctx, names)
	if err != nil {
		return nil, err
	}
	var drifts []Drift
	for _, name := range names {
		info := found[name]
		if info == nil {
			drifts = append(drifts, Drift{Stream: name, Field: "missing", Want: "there", Have: "missing"})
			continue
		}
		drifts = append(drifts, compareStream(want[name], info.Config, record.Streams[name])...)
	}
	return drifts, nil
}

func compareStream(want, have jetstream.StreamConfig, incarnation string) []Drift {
	var drifts []Drift
	differ := func(field, w, h string) {
		if w != h {
			drifts = append(drifts, Drift{Stream: want.Name, Field: field, Want: w, Have: h})
		}
	}
	differ("incarnation", incarnation, have.Metadata[IncarnationKey])
	differ("max_age", want.MaxAge.String(), have.MaxAge.String())
	if want.MaxMsgSize > 0 {
		differ("max_msg_size", strconv.Itoa(int(want.MaxMsgSize)), strconv.Itoa(int(have.MaxMsgSize)))
	}
	differ("replicas", strconv.Itoa(want.Replicas), strconv.Itoa(have.Replicas))
	differ("subjects", strings.Join(want.Subjects, " "), strings.Join(have.Subjects, " "))
	differ("atomic_publish", strconv.FormatBool(want.AllowAtomicPublish), strconv.FormatBool(have.AllowAtomicPublish))
	differ("allow_direct", strconv.FormatBool(want.AllowDirect), strconv.FormatBool(have.AllowDirect))
	differ("deny_delete", "false", strconv.FormatBool(have.DenyDelete))
	return drifts
}

// Last returns the last sequence of a message or callback stream: of its durable part,
// which is what [Journal.Read] delivers.
func (j *Journal) Last(ctx context.Context, name string) (uint64, error) {
	s := j.streams[name]
	if s == nil {
		return 0, fmt.Errorf("%w: stream %s is none of region %s", ErrInvalid, name, j.region.ID)
	}
	if s.gated {
		return s.durable.load(), nil
	}
	info, err := j.js.Stream(ctx, name)
	if err != nil {
		return 0, fmt.Errorf("last sequence of stream %s: %w", name, streamError(err))
	}
	return info.CachedInfo().State.LastSeq, nil
}

// Locate returns where a view has to be for a position of an app to be in it: the
// stream of the position's route, and the sequence there. A position of a route
// before the last two is in the views since that one, so its sequence is 0.
func (j *Journal) Locate(ctx context.Context, app AppID, position Position) (stream string, sequence uint64, err error) {
	a, err := j.App(ctx, app)
	if err != nil {
		return "", 0, err
	}
	stream = StreamName(j.region.ID, a.Plan, a.Shard)
	switch {
	case position.Generation() == a.Generation:
		sequence = position.Sequence()
	case a.Previous.Plan != "" && position.Generation() == a.Previous.Generation:
		return StreamName(j.region.ID, a.Previous.Plan, a.Previous.Shard), position.Sequence(), nil
	}
	return stream, sequence, nil
}
