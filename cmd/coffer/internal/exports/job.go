package exports

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// Format is the form of an export's files.
type Format string

// The formats.
const (
	NDJSON Format = "ndjson" // lines as a replay has them
	Agora  Format = "agora"  // a gzip file of lines for each UTC hour
)

// State is how an export stands.
type State string

// The states of an export.
const (
	Running State = "running"
	Done    State = "done"
	Failed  State = "failed" // Error says why; delete it and ask again
)

// Spec says what to export. Its zero value lacks a format.
type Spec struct {
	Format Format   `json:"format"`
	Types  []string `json:"types,omitempty"`
	// From and Until bound the events' own time.
	From  time.Time `json:"from,omitzero"`
	Until time.Time `json:"until,omitzero"`

	Conversation string `json:"-"`
	User         string `json:"-"`
}

func (s Spec) check() error {
	switch {
	case s.Format != NDJSON && s.Format != Agora:
		return fmt.Errorf("%w: the format is ndjson or agora", ErrSpec)
	case !s.From.IsZero() && !s.Until.IsZero() && !s.From.Before(s.Until):
		return fmt.Errorf("%w: until must be later than from", ErrSpec)
	case len(s.Types) > maxTypes:
		return fmt.Errorf("%w: more than %d types", ErrSpec, maxTypes)
	}
	if _, err := s.types(); err != nil {
		return err
	}
	if s.Conversation != "" {
		if err := journal.CheckConversationID(s.Conversation); err != nil {
			return err
		}
	}
	if s.User != "" {
		return journal.CheckUserID(s.User)
	}
	return nil
}

func (s Spec) types() ([]journal.Type, error) {
	var list []journal.Type
	for _, name := range s.Types {
		t, err := journal.ParseType(name)
		if err != nil {
			return nil, err
		}
		list = append(list, t)
	}
	return list, nil
}

func (s Spec) same(o Spec) bool {
	return s.Format == o.Format && s.Conversation == o.Conversation && s.User == o.User &&
		slices.Equal(s.Types, o.Types) && s.From.Equal(o.From) && s.Until.Equal(o.Until)
}

// Counts is what there is of something.
type Counts struct {
	Events  int   `json:"events"`
	Omitted int   `json:"omitted"`  // recalled, or destroyed with their keys
	LeftOut int   `json:"left_out"` // without a form in the format
	Bytes   int64 `json:"bytes"`    // of lines
}

func (c *Counts) add(o Counts) {
	c.Events += o.Events
	c.Omitted += o.Omitted
	c.LeftOut += o.LeftOut
	c.Bytes += o.Bytes
}

// Job is an export, as its row has it.
type Job struct {
	ID  string        `json:"-"` // of the row's name
	App journal.AppID `json:"-"`

	Spec

	// After and Through bound the positions; First is the first one there was.
	After   journal.Position `json:"after"`
	Through journal.Position `json:"through"`
	First   journal.Position `json:"first"`

	State State  `json:"state"`
	Error string `json:"error,omitempty"` // a class, no text of a provider
	Tries int    `json:"tries,omitzero"`  // that failed, in a row

	// Cursor is the end of the last file of lines. Hourly files begin with Hour;
	// HoursDone of Hours are done.
	Cursor    journal.Position `json:"cursor"`
	Hour      time.Time        `json:"hour,omitzero"`
	Hours     int              `json:"hours,omitzero"`
	HoursDone int              `json:"hours_done,omitzero"`

	Files int `json:"files"`
	Counts

	Oldest time.Time `json:"oldest,omitzero"` // of the events' times
	Newest time.Time `json:"newest,omitzero"`

	Owner    string    `json:"owner,omitempty"`
	Lease    time.Time `json:"lease,omitzero"`
	Created  time.Time `json:"created"`
	Updated  time.Time `json:"updated"`
	Finished time.Time `json:"finished,omitzero"`
	Expires  time.Time `json:"expires"`
}

// over reports whether the export can no longer be fetched.
func (j Job) over(now time.Time) bool { return !now.Before(j.Expires) }

// Progress is how much is done, from 0 to 1. It is an estimate: positions of an
// app are not consecutive.
func (j Job) Progress() float64 {
	switch {
	case j.State == Done:
		return 1
	case j.Format == Agora && j.Hours > 0:
		return float64(j.HoursDone) / float64(j.Hours)
	case j.Through <= j.First || j.Cursor <= j.First:
		return 0
	}
	return float64(j.Cursor-j.First) / float64(j.Through-j.First)
}

// File is the entry of a file.
type File struct {
	Name string `json:"name"`
	Counts

	SHA256  string           `json:"sha256"`
	After   journal.Position `json:"after"`
	Through journal.Position `json:"through"`
	First   time.Time        `json:"first,omitzero"`
	Last    time.Time        `json:"last,omitzero"`
	Changed time.Time        `json:"changed,omitzero"` // when something of it was found gone
}

const (
	jobPrefix   = "job.export."
	filesPrefix = "export."
	filesPerRow = 64
	rowVersion  = 1
	purpose     = "export"
)

// row is a job with the revision that a change of it must follow.
type row struct {
	Job

	revision uint64
}

// stored is a job as it is written.
type stored struct {
	Version int    `json:"version"`
	Private []byte `json:"private,omitempty"`
	Job
}

type private struct {
	Conversation string `json:"conversation,omitempty"`
	User         string `json:"user,omitempty"`
}

func (e *Exports) load(ctx context.Context, app journal.AppID, id string) (row, error) {
	if len(id) != 2*idBytes || strings.Trim(id, "0123456789abcdef") != "" {
		return row{}, ErrNotFound
	}
	loaded, err := e.rows.Load(ctx, jobPrefix+app.String()+"-"+id)
	if errors.Is(err, kms.ErrRowNotFound) {
		return row{}, ErrNotFound
	}
	if err != nil {
		return row{}, fmt.Errorf("load an export: %w", err)
	}
	var s stored
	if err := json.Unmarshal(loaded.Value, &s, json.RejectUnknownMembers(true)); err != nil || s.Version != rowVersion {
		return row{}, fmt.Errorf("%w: export %s", ErrCorrupt, id)
	}
	r := row{Job: s.Job, revision: loaded.Revision}
	r.ID, r.App = id, app
	if s.Private == nil {
		return r, nil
	}
	plain, err := e.o.Journal.Keyring().OpenBlob(ctx, app.String(), purpose, s.Private)
	if err != nil {
		return r, fmt.Errorf("open an export's filters: %w", err)
	}
	var p private
	if err := json.Unmarshal(plain, &p); err != nil {
		return r, fmt.Errorf("%w: export %s", ErrCorrupt, id)
	}
	r.Conversation, r.User = p.Conversation, p.User
	return r, nil
}

// store creates the row of a job at revision 0, and replaces it at any other.
func (e *Exports) store(ctx context.Context, r row) (row, error) {
	s := stored{Version: rowVersion, Job: r.Job}
	if r.Conversation != "" || r.User != "" {
		plain, err := json.Marshal(private{r.Conversation, r.User})
		if err != nil {
			return r, fmt.Errorf("encode an export: %w", err)
		}
		if s.Private, err = e.o.Journal.Keyring().SealBlob(ctx, r.App.String(), purpose, plain); err != nil {
			return r, fmt.Errorf("seal an export's filters: %w", err)
		}
	}
	value, err := json.Marshal(s)
	if err != nil {
		return r, fmt.Errorf("encode an export: %w", err)
	}
	r.revision, err = e.put(ctx, jobPrefix+r.App.String()+"-"+r.ID, value, r.revision)
	return r, err
}

func (e *Exports) put(ctx context.Context, name string, value []byte, revision uint64) (uint64, error) {
	if revision == 0 {
		return e.rows.Create(ctx, name, value)
	}
	return e.rows.Update(ctx, name, value, revision)
}

// entries is a row of files.
type entries struct {
	Version int    `json:"version"`
	Files   []File `json:"files"`

	revision uint64
}

func entriesName(j Job, n int) string {
	return filesPrefix + j.App.String() + "-" + j.ID + "." + strconv.Itoa(n)
}

// loadEntries returns the n-th row of files, empty when there is none.
func (e *Exports) loadEntries(ctx context.Context, j Job, n int) (entries, error) {
	list := entries{Version: rowVersion}
	loaded, err := e.rows.Load(ctx, entriesName(j, n))
	if errors.Is(err, kms.ErrRowNotFound) {
		return list, nil
	}
	if err != nil {
		return list, fmt.Errorf("load an export's files: %w", err)
	}
	if err := json.Unmarshal(loaded.Value, &list, json.RejectUnknownMembers(true)); err != nil || list.Version != rowVersion || len(list.Files) > filesPerRow {
		return list, fmt.Errorf("%w: files of export %s", ErrCorrupt, j.ID)
	}
	list.revision = loaded.Revision
	return list, nil
}

func (e *Exports) storeEntries(ctx context.Context, j Job, n int, list entries) error {
	value, err := json.Marshal(list)
	if err != nil {
		return fmt.Errorf("encode an export's files: %w", err)
	}
	_, err = e.put(ctx, entriesName(j, n), value, list.revision)
	return err
}

// Files returns the entries of all files of an export, in order.
func (e *Exports) Files(ctx context.Context, j Job) ([]File, error) {
	files := make([]File, 0, j.Files)
	for n := 0; n*filesPerRow < j.Files; n++ {
		list, err := e.loadEntries(ctx, j, n)
		if err != nil {
			return nil, err
		}
		if len(list.Files) < min(filesPerRow, j.Files-n*filesPerRow) {
			return nil, fmt.Errorf("%w: files of export %s are missing", ErrCorrupt, j.ID)
		}
		files = append(files, list.Files[:min(filesPerRow, j.Files-n*filesPerRow)]...)
	}
	return files, nil
}

// File returns the entry of one file of an export that is done.
func (e *Exports) File(ctx context.Context, j Job, name string) (File, error) {
	if j.State != Done {
		return File{}, fmt.Errorf("%w: it is %s", ErrUnfinished, j.State)
	}
	files, err := e.Files(ctx, j)
	if err != nil {
		return File{}, err
	}
	for _, f := range files {
		if f.Name == name {
			return f, nil
		}
	}
	return File{}, ErrNotFound
}

// correct replaces the entry of a file of which something has gone.
func (e *Exports) correct(ctx context.Context, j Job, f File) error {
	for {
		changed, err := e.tryCorrect(ctx, j, f)
		if !errors.Is(err, kms.ErrRowConflict) || ctx.Err() != nil {
			if changed {
				e.o.Log.Info("an export's file was corrected", "export", j.ID, "app", j.App.String(), "file", f.Name)
			}
			return err
		}
	}
}

func (e *Exports) tryCorrect(ctx context.Context, j Job, f File) (bool, error) {
	r, err := e.load(ctx, j.App, j.ID)
	if err != nil {
		return false, err
	}
	for n := 0; n*filesPerRow < r.Files; n++ {
		list, err := e.loadEntries(ctx, r.Job, n)
		if err != nil {
			return false, err
		}
		i := slices.IndexFunc(list.Files, func(o File) bool { return o.Name == f.Name })
		if i < 0 {
			continue
		}
		if list.Files[i].SHA256 == f.SHA256 {
			return false, nil // another fetch has done it
		}
		list.Files[i] = f
		return true, e.storeEntries(ctx, r.Job, n, list)
	}
	return false, ErrNotFound
}
