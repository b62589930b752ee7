package journal

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/kms"
)

// A DeletedApp is what is left of an app that is deleted or being deleted: its
// id, which is never given again.
type DeletedApp struct {
	ID      AppID
	Account string
	// Begun is when the deletion was asked for, Deleted when it was finished;
	// zero until then.
	Begun, Deleted time.Time
}

// deletedAppRecord is the row of such an app, in place of its appRecord.
type deletedAppRecord struct {
	Version int       `json:"version"`
	State   string    `json:"state"` // deleting, deleted
	Account string    `json:"account,omitzero"`
	Region  string    `json:"region"`
	Begun   time.Time `json:"begun"`
	Deleted time.Time `json:"deleted,omitzero"`
}

const (
	stateDeleting = "deleting"
	stateDeleted  = "deleted"
)

// parseDeleted returns the record of a deleted app; ok is false for the row of
// one that lives.
func parseDeleted(value []byte) (rec deletedAppRecord, ok bool) {
	if !strings.Contains(string(value[:min(len(value), 64)]), `"state"`) {
		return rec, false
	}
	err := json.Unmarshal(value, &rec, json.RejectUnknownMembers(true))
	return rec, err == nil && (rec.State == stateDeleting || rec.State == stateDeleted)
}

// BeginDelete replaces the row of an app by one that says that it is being
// deleted: from then on it is [ErrAppDeleted] and answers nobody. The name and
// the certificates are gone. It can be repeated.
func (r *Registry) BeginDelete(ctx context.Context, id AppID) (DeletedApp, error) {
	now := r.now().UTC().Truncate(time.Millisecond)
	return r.changeDeleted(ctx, id, func(row kms.Row) (deletedAppRecord, error) {
		if rec, ok := parseDeleted(row.Value); ok {
			return rec, nil
		}
		// Neither the keys nor the provider are asked: an app whose keys are
		// gone already can be deleted too.
		var rec appRecord
		if err := json.Unmarshal(row.Value, &rec); err != nil {
			return deletedAppRecord{}, fmt.Errorf("app %s: %w: the row does not parse", id, ErrCorrupt)
		}
		return deletedAppRecord{Version: appRowVersion, State: stateDeleting, Account: rec.Account, Region: r.region.ID, Begun: now}, nil
	})
}

// EndDelete says that nothing of an app is left but its id. It can be repeated.
func (r *Registry) EndDelete(ctx context.Context, id AppID) (DeletedApp, error) {
	now := r.now().UTC().Truncate(time.Millisecond)
	return r.changeDeleted(ctx, id, func(row kms.Row) (deletedAppRecord, error) {
		rec, ok := parseDeleted(row.Value)
		if !ok {
			return rec, fmt.Errorf("app %s: %w: it is not being deleted", id, ErrInvalid)
		}
		if rec.State == stateDeleting {
			rec.State, rec.Deleted = stateDeleted, now
		}
		return rec, nil
	})
}

// Deleted returns what is left of a deleted app. An app that lives is
// [ErrAppExists].
func (r *Registry) Deleted(ctx context.Context, id AppID) (DeletedApp, error) {
	row, err := r.loadRow(ctx, id)
	if err != nil {
		return DeletedApp{}, err
	}
	rec, ok := parseDeleted(row.Value)
	if !ok {
		return DeletedApp{}, fmt.Errorf("app %s: %w", id, ErrAppExists)
	}
	return DeletedApp{ID: id, Account: rec.Account, Begun: rec.Begun, Deleted: rec.Deleted}, nil
}

// AppsOf returns the apps of an account, those that are being deleted too, but
// not those that are deleted. It asks for no keys.
func (r *Registry) AppsOf(ctx context.Context, account string) ([]AppID, error) {
	apps, err := r.owned(ctx, func(owner string) bool { return owner == account })
	if err != nil {
		return nil, fmt.Errorf("apps of account %s: %w", account, err)
	}
	return apps[account], nil
}

// AppsByAccount returns what [Registry.AppsOf] does of every account that has apps,
// for the cost of one. Apps without an account are under "".
func (r *Registry) AppsByAccount(ctx context.Context) (map[string][]AppID, error) {
	apps, err := r.owned(ctx, func(string) bool { return true })
	if err != nil {
		return nil, fmt.Errorf("apps of all accounts: %w", err)
	}
	return apps, nil
}

// owned returns the apps of the accounts that are wanted.
func (r *Registry) owned(ctx context.Context, wanted func(account string) bool) (map[string][]AppID, error) {
	apps := make(map[string][]AppID)
	for name, err := range r.rows.List(ctx, appRow) {
		if err != nil {
			return nil, err
		}
		id, err := ParseAppID(strings.TrimPrefix(name, appRow))
		if err != nil {
			return nil, fmt.Errorf("row %s: %w", name, ErrCorrupt)
		}
		row, err := r.loadRow(ctx, id)
		if errors.Is(err, ErrUnknownApp) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if rec, gone := parseDeleted(row.Value); gone {
			if rec.State == stateDeleting && wanted(rec.Account) {
				apps[rec.Account] = append(apps[rec.Account], id)
			}
			continue
		}
		var rec appRecord
		if err := json.Unmarshal(row.Value, &rec); err != nil {
			return nil, fmt.Errorf("app %s: %w: the row does not parse", id, ErrCorrupt)
		}
		if wanted(rec.Account) {
			apps[rec.Account] = append(apps[rec.Account], id)
		}
	}
	return apps, nil
}

func (r *Registry) loadRow(ctx context.Context, id AppID) (kms.Row, error) {
	if id.Region() != r.region.Number {
		return kms.Row{}, fmt.Errorf("app %s: %w", id, ErrWrongRegion)
	}
	row, err := r.rows.Load(ctx, appRow+id.String())
	if errors.Is(err, kms.ErrRowNotFound) {
		return kms.Row{}, fmt.Errorf("app %s: %w", id, ErrUnknownApp)
	}
	if err != nil {
		return kms.Row{}, fmt.Errorf("load app %s: %w", id, err)
	}
	return row, nil
}

func (r *Registry) changeDeleted(ctx context.Context, id AppID, change func(kms.Row) (deletedAppRecord, error)) (DeletedApp, error) {
	for {
		row, err := r.loadRow(ctx, id)
		if err != nil {
			return DeletedApp{}, err
		}
		rec, err := change(row)
		if err != nil {
			return DeletedApp{}, err
		}
		left := DeletedApp{ID: id, Account: rec.Account, Begun: rec.Begun, Deleted: rec.Deleted}
		value, err := json.Marshal(rec)
		if err != nil {
			return DeletedApp{}, fmt.Errorf("delete app %s: %w", id, err)
		}
		if string(value) == string(row.Value) {
			return left, nil
		}
		_, err = r.rows.Update(ctx, appRow+id.String(), value, row.Revision)
		r.evict(id)
		switch {
		case errors.Is(err, kms.ErrRowConflict):
			continue
		case err != nil:
			return DeletedApp{}, fmt.Errorf("delete app %s: %w", id, err)
		}
		return left, nil
	}
}

// PurgeApp removes the messages of an app, and its callbacks and monitoring data,
// from the streams, and returns how many. Destroy its keys first: what a server
// has on disk of them goes when it writes its blocks anew, and the newest message
// of a stream stays until it expires, whosever it is. What is removed is noted in
// the registry, so that readers of the others' messages do not take it for a
// loss. It can be repeated, and must be after an error.
func (j *Journal) PurgeApp(ctx context.Context, app AppID, progress func(int)) (int, error) {
	if progress == nil {
		progress = func(int) {}
	}
	total := 0
	err := j.streamsOf(ctx, app, func(stream, filter string) error {
		n, err := j.purgeSubject(ctx, stream, filter, progress)
		total += n
		return err
	})
	if err != nil {
		return total, fmt.Errorf("purge app %s: %w", app, err)
	}
	return total, nil
}

// CountApp returns how many messages, callbacks and monitoring records an app has.
func (j *Journal) CountApp(ctx context.Context, app AppID) (int, error) {
	total := 0
	err := j.streamsOf(ctx, app, func(stream, filter string) error {
		s, err := j.js.Stream(ctx, stream)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return nil
		}
		if err != nil {
			return streamError(err)
		}
		info, err := s.Info(ctx, jetstream.WithSubjectFilter(filter))
		if err != nil {
			return streamError(err)
		}
		for _, n := range info.State.Subjects {
			total += int(n) //nolint:gosec // far below
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("count app %s: %w", app, err)
	}
	return total, nil
}

// streamsOf calls fn with every stream that can have something of an app, and
// the subjects that it would have it under.
func (j *Journal) streamsOf(ctx context.Context, app AppID, fn func(stream, filter string) error) error {
	names := j.js.StreamNames(ctx)
	for name := range names.Name() {
		for _, filter := range j.filtersOf(name, app) {
			if err := fn(name, filter); err != nil {
				return fmt.Errorf("stream %s: %w", name, err)
			}
		}
	}
	if err := names.Err(); err != nil {
		return streamError(err)
	}
	return nil
}

// filtersOf returns the subjects of an app in a stream of its region: messages,
// markers, callbacks and monitoring data end in the app or have it before their
// last token.
func (j *Journal) filtersOf(stream string, app AppID) []string {
	switch {
	case j.streams[stream] != nil && strings.Contains(stream, "_msg_"):
		return []string{"msg.*.*." + app.String() + ".*"}
	case strings.HasPrefix(stream, strings.TrimSuffix(CallbackStreams(j.region.ID), "*")):
		return []string{"cb.*." + app.String()}
	case stream == MonitoringStream(j.region.ID):
		return []string{"mon." + app.String()}
	}
	return nil
}
