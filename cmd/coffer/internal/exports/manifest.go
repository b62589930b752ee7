package exports

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// ManifestVersion is the version of manifests.
const ManifestVersion = 1

// Filters is what an export was narrowed by.
type Filters struct {
	Conversation string    `json:"conversation,omitempty"`
	User         string    `json:"user,omitempty"`
	Types        []string  `json:"types,omitempty"`
	From         time.Time `json:"from,omitzero"`
	Until        time.Time `json:"until,omitzero"`
}

// Manifest says what an export holds (docs/format/export.md).
type Manifest struct {
	Version int           `json:"version"`
	ID      string        `json:"id"`
	App     journal.AppID `json:"app"`
	Region  string        `json:"region"`
	Log     string        `json:"log"`
	Format  Format        `json:"format"`
	Filters Filters       `json:"filters"`

	After   journal.Position `json:"after"`
	Through journal.Position `json:"through"`
	First   time.Time        `json:"first,omitzero"`
	Last    time.Time        `json:"last,omitzero"`
	Counts

	Created  time.Time `json:"created"`
	Finished time.Time `json:"finished"`
	Files    []File    `json:"files"`
	SHA256   string    `json:"sha256"`
}

// Manifest returns the manifest of an export that is done.
func (e *Exports) Manifest(ctx context.Context, j Job) (Manifest, error) {
	if j.State != Done {
		return Manifest{}, fmt.Errorf("%w: it is %s", ErrUnfinished, j.State)
	}
	files, err := e.Files(ctx, j)
	if err != nil {
		return Manifest{}, err
	}
	log := e.o.Journal.LogID()
	m := Manifest{
		Version: ManifestVersion, ID: j.ID, App: j.App, Region: e.o.Region.ID, Log: hex.EncodeToString(log[:]), Format: j.Format,
		Filters: Filters{j.Conversation, j.User, j.Types, j.From, j.Until},
		After:   j.After, Through: j.Through, Created: j.Created, Finished: j.Finished, Files: files,
	}
	sum := sha256.New()
	for _, f := range files {
		m.Counts.add(f.Counts)
		if f.Events > 0 && (m.First.IsZero() || f.First.Before(m.First)) {
			m.First = f.First
		}
		if f.Last.After(m.Last) {
			m.Last = f.Last
		}
		_, _ = io.WriteString(sum, f.SHA256+"  "+f.Name+"\n") // never fails
	}
	m.SHA256 = hex.EncodeToString(sum.Sum(nil))
	return m, nil
}
