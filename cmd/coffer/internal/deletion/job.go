package deletion

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// ErrNoDeletion means that nothing with the id was ever to be deleted here.
var ErrNoDeletion = errors.New("no such deletion")

const (
	rowPrefix     = "job.delete."
	accountPrefix = "account-"
)

// Kind is what is deleted.
type Kind string

// The kinds of deletions.
const (
	App     Kind = "app"
	Account Kind = "account"
)

// State is how a deletion stands.
type State string

// The states of a deletion. None fails for good: what keeps it is tried again.
const (
	Running State = "running"
	Done    State = "done"
)

// Job is a deletion as its row has it.
type Job struct {
	ID      string `json:"id"`
	Kind    Kind   `json:"kind"`
	Target  string `json:"target"`
	Actor   string `json:"actor"`
	State   State  `json:"state"`
	Step    string `json:"step"    doc:"the step that comes next"`
	Removed int    `json:"removed" doc:"messages, rows and apps; a process that is killed takes its count of the present step along"`
	Error   string `json:"error,omitempty" doc:"what keeps it at present"`

	Owner    string    `json:"owner,omitempty"`
	Lease    time.Time `json:"lease,omitzero"`
	Started  time.Time `json:"started"`
	Updated  time.Time `json:"updated"`
	Finished time.Time `json:"finished,omitzero"`
}

// jobRow is a job with the revision that a change of it must follow.
type jobRow struct {
	Job

	revision uint64
}

// idOf is the id of the one deletion that a target has.
func idOf(kind Kind, target string) string {
	if kind == Account {
		return accountPrefix + target
	}
	return target
}

func checkID(id string) error {
	for i := range len(id) {
		if c := id[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return fmt.Errorf("%w: %q", ErrNoDeletion, id)
		}
	}
	if id == "" || len(id) > 80 {
		return ErrNoDeletion
	}
	return nil
}

// Job returns a deletion.
func (d *Deletions) Job(ctx context.Context, id string) (Job, error) {
	row, err := d.load(ctx, id)
	return row.Job, err
}

// Jobs returns the deletions of the region, the latest first.
func (d *Deletions) Jobs(ctx context.Context) ([]Job, error) {
	jobs := []Job{}
	for name, err := range d.rows.List(ctx, rowPrefix) {
		if err != nil {
			return nil, fmt.Errorf("list deletions: %w", err)
		}
		row, err := d.load(ctx, strings.TrimPrefix(name, rowPrefix))
		if errors.Is(err, ErrNoDeletion) {
			continue
		}
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, row.Job)
	}
	slices.SortFunc(jobs, func(x, y Job) int { return y.Started.Compare(x.Started) })
	return jobs, nil
}

func (d *Deletions) load(ctx context.Context, id string) (jobRow, error) {
	if err := checkID(id); err != nil {
		return jobRow{}, err
	}
	row, err := d.rows.Load(ctx, rowPrefix+id)
	if errors.Is(err, kms.ErrRowNotFound) {
		return jobRow{}, fmt.Errorf("%w: %s", ErrNoDeletion, id)
	}
	if err != nil {
		return jobRow{}, fmt.Errorf("load deletion %s: %w", id, err)
	}
	job := jobRow{revision: row.Revision}
	if err := json.Unmarshal(row.Value, &job.Job); err != nil {
		return jobRow{}, fmt.Errorf("deletion %s: %w", id, journal.ErrCorrupt)
	}
	return job, nil
}

// store writes a job by compare-and-set, and moves its revision.
func (d *Deletions) store(ctx context.Context, job *jobRow) error {
	job.Updated = d.now().UTC()
	value, err := json.Marshal(job.Job)
	if err != nil {
		return fmt.Errorf("encode deletion %s: %w", job.ID, err)
	}
	if job.revision == 0 {
		job.revision, err = d.rows.Create(ctx, rowPrefix+job.ID, value)
	} else {
		job.revision, err = d.rows.Update(ctx, rowPrefix+job.ID, value, job.revision)
	}
	if err != nil {
		return fmt.Errorf("store deletion %s: %w", job.ID, err)
	}
	return nil
}
