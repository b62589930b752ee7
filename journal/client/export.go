package client

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// ErrManifest means that a manifest does not keep to its format, or does not agree
// with itself. Fetch it again; one that was changed proves nothing.
var ErrManifest = errors.New("the manifest is not valid")

// The formats of an export.
const (
	ExportNDJSON = "ndjson" // lines as a replay has them
	ExportAgora  = "agora"  // a gzip file of lines for each UTC hour, as Agora Chat has them
)

// ExportFilters narrow an export. The zero value selects all.
type ExportFilters struct {
	Conversation string    `json:"conversation,omitempty"`
	User         string    `json:"user,omitempty"`
	Types        []string  `json:"types,omitempty"`
	From         time.Time `json:"from,omitzero"` // of the events' own time
	Until        time.Time `json:"until,omitzero"`
}

// ExportCounts is what there is of something.
type ExportCounts struct {
	Events  int   `json:"events"`
	Omitted int   `json:"omitted"`  // recalled, or destroyed with their keys
	LeftOut int   `json:"left_out"` // without a form in the format
	Bytes   int64 `json:"bytes"`    // of lines
}

// Export is how an export stands. Its State is running, done or failed.
type Export struct {
	ID       string           `json:"id"`
	State    string           `json:"state"`
	Format   string           `json:"format"`
	Filters  ExportFilters    `json:"filters"`
	After    journal.Position `json:"after"`
	Through  journal.Position `json:"through"`
	Progress float64          `json:"progress"` // an estimate, from 0 to 1
	ExportCounts

	Files    int       `json:"files"`
	Error    string    `json:"error,omitempty"`
	Created  time.Time `json:"created"`
	Updated  time.Time `json:"updated"`
	Finished time.Time `json:"finished,omitzero"`
	Expires  time.Time `json:"expires"`
}

// ExportManifest says what an export holds (docs/format/export.md).
type ExportManifest struct {
	Version int              `json:"version"`
	ID      string           `json:"id"`
	App     journal.AppID    `json:"app"`
	Region  string           `json:"region"`
	Log     string           `json:"log"`
	Format  string           `json:"format"`
	Filters ExportFilters    `json:"filters"`
	After   journal.Position `json:"after"`
	Through journal.Position `json:"through"`
	First   time.Time        `json:"first,omitzero"`
	Last    time.Time        `json:"last,omitzero"`
	ExportCounts

	Created  time.Time    `json:"created"`
	Finished time.Time    `json:"finished"`
	Files    []ExportFile `json:"files"`
	SHA256   string       `json:"sha256"`
}

// ExportFile is the entry of a file.
type ExportFile struct {
	Name string `json:"name"`
	ExportCounts

	SHA256  string           `json:"sha256"` // of the lines
	After   journal.Position `json:"after"`
	Through journal.Position `json:"through"`
	First   time.Time        `json:"first,omitzero"`
	Last    time.Time        `json:"last,omitzero"`
	Changed time.Time        `json:"changed,omitzero"`
}

const exportVersion = 1

// ParseExportManifest parses a manifest and checks that it agrees with itself. The
// names of its files are safe to be joined to the path of a directory.
func ParseExportManifest(text []byte) (ExportManifest, error) {
	var m ExportManifest
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("%w: it cannot be read", ErrManifest)
	}
	return m, m.check()
}

func (m *ExportManifest) check() error {
	names := regexp.MustCompile(`^events-[0-9]{6}\.ndjson$`)
	switch {
	case m.Version != exportVersion:
		return fmt.Errorf("%w: version %d is not known", ErrManifest, m.Version)
	case m.App == (journal.AppID{}):
		return fmt.Errorf("%w: the app is missing", ErrManifest)
	case m.Format == ExportAgora:
		names = regexp.MustCompile(`^[0-9]{10}\.gz$`)
	case m.Format != ExportNDJSON:
		return fmt.Errorf("%w: the format is not known", ErrManifest)
	}
	digest := regexp.MustCompile(`^[0-9a-f]{64}$`)
	seen := make(map[string]bool, len(m.Files))
	var sum ExportCounts
	for _, f := range m.Files {
		switch {
		case !names.MatchString(f.Name) || seen[f.Name]:
			return fmt.Errorf("%w: the name of a file", ErrManifest)
		case !digest.MatchString(f.SHA256):
			return fmt.Errorf("%w: the digest of %s", ErrManifest, f.Name)
		case f.Events < 0 || f.Bytes < 0 || f.Omitted < 0 || f.LeftOut < 0 || f.Events > 0 && f.Bytes == 0 || f.Through > m.Through:
			return fmt.Errorf("%w: the counts of %s", ErrManifest, f.Name)
		}
		seen[f.Name] = true
		sum.Events += f.Events
		sum.Bytes += f.Bytes
		sum.Omitted += f.Omitted
		sum.LeftOut += f.LeftOut
	}
	if sum != m.ExportCounts {
		return fmt.Errorf("%w: its counts are not the sums of the files'", ErrManifest)
	}
	if m.SHA256 != m.digest() {
		return fmt.Errorf("%w: its digest is another", ErrManifest)
	}
	return nil
}

func (m *ExportManifest) digest() string {
	sum := sha256.New()
	for _, f := range m.Files {
		_, _ = io.WriteString(sum, f.SHA256+"  "+f.Name+"\n") // never fails
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// StartExport begins an export of what the app has now. The key, an event's id in
// form, makes it safe to be repeated: with the same key and filters it returns the
// export of the first call.
func (c *Client) StartExport(ctx context.Context, format string, filters ExportFilters, key string) (e Export, err error) {
	r := request{method: http.MethodPost, path: c.appPath("exports"), mime: "application/json", accept: "application/json", key: key}
	r.body, err = json.Marshal(struct {
		Format string `json:"format"`
		ExportFilters
	}{format, filters})
	if err != nil {
		return e, fmt.Errorf("encoding the request: %w", err)
	}
	if key == "" {
		return e, c.attempt(ctx, r, func(resp *http.Response) error { return decode(resp, &e) })
	}
	return e, c.getJSON(ctx, r, &e)
}

// Export returns an export of the app.
func (c *Client) Export(ctx context.Context, id string) (e Export, err error) {
	return e, c.getJSON(ctx, request{method: http.MethodGet, path: c.appPath("exports", id), accept: "application/json"}, &e)
}

// Exports returns the exports of the app, the latest first.
func (c *Client) Exports(ctx context.Context) ([]Export, error) {
	var list struct {
		Data []Export `json:"data"`
	}
	err := c.getJSON(ctx, request{method: http.MethodGet, path: c.appPath("exports"), accept: "application/json"}, &list)
	return list.Data, err
}

// DeleteExport ends and removes an export; one that is not there is no error.
func (c *Client) DeleteExport(ctx context.Context, id string) error {
	r := request{method: http.MethodDelete, path: c.appPath("exports", id)}
	err := c.call(ctx, r, func(*http.Response) error { return nil })
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// ExportManifest returns the manifest of an export that is done.
func (c *Client) ExportManifest(ctx context.Context, id string) (m ExportManifest, err error) {
	r := request{method: http.MethodGet, path: c.appPath("exports", id, "manifest"), accept: "application/json"}
	err = c.call(ctx, r, func(resp *http.Response) error {
		text, err := readBody(resp)
		if err != nil {
			return err
		}
		m, err = ParseExportManifest(text)
		return err
	})
	return m, err
}

// ExportFile fetches a file of an export. begin is called at each attempt, so that
// what an attempt that was cut has written can be thrown away; a file that arrived
// whole is not compared with its digest.
func (c *Client) ExportFile(ctx context.Context, id, name string, begin func() (io.Writer, error)) error {
	p := patience{limit: c.retryFor}
	for {
		r := request{method: http.MethodGet, path: c.appPath("exports", id, "files", name)}
		n, err := c.download(ctx, r, func(*http.Response) (io.Writer, error) { return begin() })
		if err == nil {
			return nil
		}
		if n > 0 {
			p.reset()
		}
		if err := p.wait(ctx, c.log, err); err != nil {
			return err
		}
	}
}

// download makes one attempt, which may take as long as something arrives, and
// returns how much has been written.
func (c *Client) download(ctx context.Context, r request, begin func(*http.Response) (io.Writer, error)) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	resp, err := c.send(ctx, r)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	w, err := begin(resp)
	if err != nil {
		return 0, err
	}
	quiet := time.AfterFunc(quietLimit, func() {
		cancel(&connectionError{err: fmt.Errorf("nothing arrived for %s", quietLimit)})
	})
	defer quiet.Stop()
	in := &source{r: &watched{resp.Body, quiet}}
	n, err := io.Copy(w, in)
	if in.err == nil || ctx.Err() == nil && err == nil {
		return n, err // the writer's
	}
	if cause := context.Cause(ctx); cause != nil {
		return n, cause
	}
	return n, &connectionError{err: fmt.Errorf("the file was cut: %w", in.err)}
}

// source remembers that reading failed, and not writing.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}
