package exportdir

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

// The sentinels below are what callers branch on.
var (
	// ErrComplete means that the directory has a whole export. Take another
	// directory.
	ErrComplete = errors.New("the directory has a complete export")
	// ErrAnother means that an export with other filters, or of another app, was
	// begun in the directory. Repeat the command that began it, or take another
	// directory.
	ErrAnother = errors.New("another export was begun in the directory")
	// ErrFailed means that the server could not make the export. Its error says
	// why; the next fetch asks for a new one.
	ErrFailed = errors.New("the server could not make the export")
	// ErrDigest means that a file is not what the manifest says. Remove it and
	// fetch again.
	ErrDigest = errors.New("a file is not what the manifest says")
	// ErrUnfinished means that the directory has no whole export. Repeat the
	// command that began it.
	ErrUnfinished = errors.New("the directory has no complete export")
)

const (
	manifestName = "manifest.json"
	stateName    = "export.json"
	partSuffix   = ".part"

	maxRounds = 8 // manifests that change while files are fetched
	firstLook = 20 * time.Millisecond
	lastLook  = time.Second
)

// Source is what a fetch needs of the client.
type Source interface {
	StartExport(ctx context.Context, format string, filters client.ExportFilters, key string) (client.Export, error)
	Export(ctx context.Context, id string) (client.Export, error)
	ExportManifest(ctx context.Context, id string) (client.ExportManifest, error)
	ExportFile(ctx context.Context, id, name string, begin func() (io.Writer, error)) error
	DeleteExport(ctx context.Context, id string) error
}

// Options says what to fetch.
type Options struct {
	App     journal.AppID
	Format  string
	Filters client.ExportFilters
	// Keep leaves the export at the server, where it goes by itself after a while.
	Keep bool
	// Progress is called now and then, never concurrently.
	Progress func(Progress)
}

// Progress says how far a fetch is.
type Progress struct {
	Making   float64 // of the export at the server, from 0 to 1
	Files    int     // that are here, of Of
	Of       int
	Bytes    int64 // of lines in those files, of Total
	Total    int64
	Fetching bool // false while the server makes the export
}

// state is what the directory knows of an export that is not complete.
type state struct {
	App     journal.AppID        `json:"app"`
	Format  string               `json:"format"`
	Filters client.ExportFilters `json:"filters"`
	Key     string               `json:"key"`
}

func (s state) same(o state) bool {
	f, g := s.Filters, o.Filters
	return s.App == o.App && s.Format == o.Format && f.Conversation == g.Conversation && f.User == g.User &&
		slices.Equal(f.Types, g.Types) && f.From.Equal(g.From) && f.Until.Equal(g.Until)
}

// Fetch asks for an export and writes its files into dir, which it makes, or goes
// on with the one that was begun there.
func Fetch(ctx context.Context, from Source, dir string, o Options) (client.ExportManifest, error) {
	s, err := begin(dir, o)
	if err != nil {
		return client.ExportManifest{}, err
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	f := fetch{from: from, dir: dir, o: o}
	job, err := f.made(ctx, s)
	if err != nil {
		return client.ExportManifest{}, err
	}
	m, err := f.files(ctx, job.ID)
	if err != nil {
		return m, err
	}
	if err := writeJSON(filepath.Join(dir, manifestName), m); err != nil {
		return m, err
	}
	if err := os.Remove(filepath.Join(dir, stateName)); err != nil {
		return m, err
	}
	if !o.Keep {
		// The export is here; that it stays there for a while is no failure.
		_ = from.DeleteExport(ctx, job.ID)
	}
	return m, nil
}

// begin makes the directory, or finds what was begun in it.
func begin(dir string, o Options) (state, error) {
	s := state{App: o.App, Format: o.Format, Filters: o.Filters, Key: newKey()}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return s, err
	}
	text, err := os.ReadFile(filepath.Join(dir, stateName))
	switch {
	case err == nil:
		var old state
		if err := json.Unmarshal(text, &old); err != nil {
			return s, fmt.Errorf("%w: %s cannot be read", ErrAnother, stateName)
		}
		if !old.same(s) {
			return s, ErrAnother
		}
		return old, nil
	case !errors.Is(err, os.ErrNotExist):
		return s, err
	}
	if _, err := os.Stat(filepath.Join(dir, manifestName)); err == nil {
		return s, ErrComplete
	}
	return s, writeJSON(filepath.Join(dir, stateName), s)
}

func newKey() string {
	var key [16]byte
	rand.Read(key[:]) // never fails; it ends the process instead
	return "fetch-" + hex.EncodeToString(key[:])
}

type fetch struct {
	from Source
	dir  string
	o    Options
}

// made waits until the server has made the export.
func (f *fetch) made(ctx context.Context, s state) (client.Export, error) {
	job, err := f.from.StartExport(ctx, s.Format, s.Filters, s.Key)
	for pause := firstLook; err == nil && job.State == "running"; pause = min(2*pause, lastLook) {
		f.o.Progress(Progress{Making: job.Progress})
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return job, context.Cause(ctx)
		}
		job, err = f.from.Export(ctx, job.ID)
	}
	if err != nil {
		return job, err
	}
	if job.State != "done" {
		err := fmt.Errorf("%w: %s", ErrFailed, job.Error)
		// The next one asks anew.
		return job, errors.Join(err, os.Remove(filepath.Join(f.dir, stateName)), f.from.DeleteExport(ctx, job.ID))
	}
	return job, nil
}

// files fetches what is not here, until everything is what the manifest says: it
// changes when an event has gone meanwhile.
func (f *fetch) files(ctx context.Context, id string) (client.ExportManifest, error) {
	for range maxRounds {
		m, err := f.from.ExportManifest(ctx, id)
		if err != nil {
			return m, err
		}
		p := Progress{Making: 1, Fetching: true, Of: len(m.Files), Total: m.Bytes}
		changed := false
		for _, file := range m.Files {
			f.o.Progress(p)
			here, err := f.file(ctx, id, m.Format, file)
			if err != nil {
				return m, err
			}
			changed = changed || !here
			p.Files++
			p.Bytes += file.Bytes
		}
		f.o.Progress(p)
		if !changed {
			return m, f.tidy(m)
		}
	}
	return client.ExportManifest{}, fmt.Errorf("%w: it kept changing while it was fetched; fetch again", ErrDigest)
}

// file fetches one file; false when what arrived is not what was listed.
func (f *fetch) file(ctx context.Context, id, format string, entry client.ExportFile) (bool, error) {
	path := filepath.Join(f.dir, entry.Name)
	switch err := check(path, format, entry); {
	case err == nil:
		return true, nil
	case !errors.Is(err, os.ErrNotExist) && !errors.Is(err, ErrDigest):
		return false, err
	}
	part, err := os.OpenFile(path+partSuffix, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return false, err
	}
	defer func() { _ = part.Close() }()
	err = f.from.ExportFile(ctx, id, entry.Name, func() (io.Writer, error) {
		if _, err := part.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		return part, part.Truncate(0)
	})
	if err != nil {
		return false, err
	}
	switch err := check(path+partSuffix, format, entry); {
	case errors.Is(err, ErrDigest):
		return false, nil
	case err != nil:
		return false, err
	}
	if err := part.Sync(); err != nil {
		return false, err
	}
	if err := os.Rename(path+partSuffix, path); err != nil {
		return false, err
	}
	return true, syncDir(f.dir)
}

// tidy removes what an interrupted attempt has left.
func (f *fetch) tidy(m client.ExportManifest) error {
	for _, file := range m.Files {
		if err := os.Remove(filepath.Join(f.dir, file.Name+partSuffix)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// writeJSON replaces a file at once.
func writeJSON(path string, v any) error {
	text, err := json.Marshal(v, jsontext.WithIndent(" "))
	if err != nil {
		return fmt.Errorf("encoding %s: %w", filepath.Base(path), err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes a rename in the directory survive a power cut.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
