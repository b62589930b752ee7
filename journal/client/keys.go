package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
)

// KeyJobSpec says what a job is to do with the keys of the region.
type KeyJobSpec struct {
	Kind   string `json:"kind"`          // rewrap, migrate, replace, verify
	App    string `json:"app,omitempty"` // empty: every app
	To     string `json:"to,omitempty"`  // of migrate: the KEK's setting
	DryRun bool   `json:"dry_run"`
}

// KeyJob is a long operation on the keys of a region. Its State is running, done,
// failed (some apps failed) or stopped (starting it again goes on).
type KeyJob struct {
	ID string `json:"id"`
	KeyJobSpec

	Actor    string         `json:"actor"`
	State    string         `json:"state"`
	From     *kms.Identity  `json:"from,omitempty"`
	Target   *kms.Identity  `json:"target,omitempty"`
	Phase    string         `json:"phase"`
	Cursor   string         `json:"cursor"`
	Total    int            `json:"total"`
	Done     int            `json:"done"`
	Skipped  int            `json:"skipped"`
	Failed   int            `json:"failed"`
	Failures []KeyJobFailed `json:"failures,omitempty"`
	Error    string         `json:"error,omitempty"`
	Owner    string         `json:"owner"`
	Lease    time.Time      `json:"lease"`
	Started  time.Time      `json:"started"`
	Updated  time.Time      `json:"updated"`
	Finished time.Time      `json:"finished,omitzero"`
}

// Ended reports whether nobody works on the job any more.
func (j KeyJob) Ended() bool { return j.State != "running" }

// KeyJobFailed is an app that a job could not do.
type KeyJobFailed struct {
	App   string `json:"app"`
	Error string `json:"error"` // a class such as access_denied
}

// KeyStatus is how the keys of a region stand.
type KeyStatus struct {
	Region  string       `json:"region"`
	Apps    int          `json:"apps"`
	KEKs    []KEKStatus  `json:"keks"`
	Unknown []UnknownKEK `json:"unknown"`
	Cached  int          `json:"cached_apps"`
	Bridged int          `json:"bridged_apps"` // used past their revalidation: the key service is away
	Since   time.Time    `json:"since,omitzero"`
	Job     *KeyJob      `json:"job,omitempty"`
	Backups []KeyBackup  `json:"backups"`
}

// KEKStatus is a key encryption key and how many wraps are under its versions.
type KEKStatus struct {
	kms.Identity

	Primary     bool             `json:"primary"`
	Configured  bool             `json:"configured"`
	Description *kms.Description `json:"description,omitempty"`
	Error       string           `json:"error,omitempty"`
	Versions    map[string]int   `json:"versions"`
	Oldest      time.Time        `json:"oldest,omitzero"`
}

// UnknownKEK is a setting whose KEK has not answered since the server's start.
type UnknownKEK struct {
	Setting string `json:"setting"`
	Error   string `json:"error"`
}

// AppKeys is what wraps the key of one app.
type AppKeys struct {
	App       string `json:"app"`
	Destroyed bool   `json:"destroyed,omitempty"`
	Keys      []struct {
		Generation uint32    `json:"generation"`
		Wraps      []WrapRef `json:"wraps"`
	} `json:"keys"`
	// Epochs are there when one app was asked for.
	Epochs []KeyEpoch `json:"epochs,omitempty"`
}

// KeyEpoch is an epoch whose key seals a part of what an app keeps.
type KeyEpoch struct {
	ID    uint32 `json:"id"`
	Class string `json:"class"` // a plan and the app's generation in it, attachments, callbacks, profiles, …
	// Expires is when its key is to be destroyed; zero for one that does not end.
	Expires time.Time `json:"expires,omitzero"`
	// Destroyed is when it was.
	Destroyed time.Time `json:"destroyed,omitzero"`
}

// WrapRef names a wrap.
type WrapRef struct {
	Provider  string    `json:"provider"`
	Key       string    `json:"key"`
	Version   string    `json:"version"`
	WrappedAt time.Time `json:"wrapped_at"`
}

// KeyBackup is a kept copy of the keyring.
type KeyBackup struct {
	ID    string    `json:"id"`
	Made  time.Time `json:"made"`
	Until time.Time `json:"until"`
	Wraps []WrapRef `json:"wraps"`
}

// KeyUse is something that needs a version of a KEK.
type KeyUse struct {
	App    string `json:"app,omitempty"`
	Backup string `json:"backup,omitempty"`
	Wrap   string `json:"wrap"`
}

// KeyRetirement is what RetireKey found or did.
type KeyRetirement struct {
	kms.Identity

	Before string   `json:"before,omitempty"`
	Needed int      `json:"needed"`
	Uses   []KeyUse `json:"uses"`
	Done   bool     `json:"done"`
}

// KeyFinding is something that an operator should know: its Level is ok, warning
// or problem.
type KeyFinding struct {
	Level  string `json:"level"`
	Check  string `json:"check"`
	Detail string `json:"detail"`
}

// KeyVersion is a version of a KEK.
type KeyVersion struct {
	kms.Identity

	Version string `json:"version"`
}

const keysPath = "/v1/admin/keys/"

func operatorGet(path string) request {
	return request{method: http.MethodGet, path: path, accept: "application/json", operator: true}
}

func operatorPost(path string, in any) (request, error) {
	r := request{method: http.MethodPost, path: path, accept: "application/json", operator: true}
	if in == nil {
		return r, nil
	}
	var err error
	if r.body, err = json.Marshal(in); err != nil {
		return r, fmt.Errorf("encoding the request: %w", err)
	}
	r.mime = "application/json"
	return r, nil
}

// KeyStatus tells what wraps what, and how every KEK is.
func (c *Client) KeyStatus(ctx context.Context) (s KeyStatus, err error) {
	return s, c.getJSON(ctx, operatorGet(keysPath+"status"), &s)
}

// KeyFindings tells what an operator should do something about.
func (c *Client) KeyFindings(ctx context.Context) ([]KeyFinding, error) {
	var list struct {
		Data []KeyFinding `json:"data"`
	}
	err := c.getJSON(ctx, operatorGet(keysPath+"doctor"), &list)
	return list.Data, err
}

// KeyInventory calls fn for every app of the region. An answer that was cut is
// [ErrProtocol].
func (c *Client) KeyInventory(ctx context.Context, fn func(AppKeys) error) error {
	return c.keyInventory(ctx, operatorGet(keysPath+"inventory"), fn)
}

// KeysOf tells what wraps the key of one app, and which epochs it has.
func (c *Client) KeysOf(ctx context.Context, app string) (keys AppKeys, err error) {
	r := operatorGet(keysPath + "inventory")
	r.query = url.Values{"app": {app}}
	err = c.keyInventory(ctx, r, func(k AppKeys) error { keys = k; return nil })
	return keys, err
}

func (c *Client) keyInventory(ctx context.Context, r request, fn func(AppKeys) error) error {
	r.accept = "application/x-ndjson"
	count, whole := 0, false
	err := c.lines(ctx, r, func(line []byte) error {
		var item struct {
			AppKeys

			End *struct {
				Count int `json:"count"`
			} `json:"end"`
		}
		if err := json.Unmarshal(line, &item); err != nil {
			return fmt.Errorf("%w: a line is no app", ErrProtocol)
		}
		if item.End != nil {
			whole = item.End.Count == count
			return nil
		}
		count++
		return fn(item.AppKeys)
	})
	if err == nil && !whole {
		return fmt.Errorf("%w: the inventory was cut", ErrProtocol)
	}
	return err
}

// RotateKEK makes a new version of the KEK that wraps the keys of new apps. It is
// sent once: KeyStatus tells whether an answer that was lost did it.
func (c *Client) RotateKEK(ctx context.Context) (v KeyVersion, err error) {
	r, err := operatorPost(keysPath+"rotate", nil)
	if err != nil {
		return v, err
	}
	return v, c.attempt(ctx, r, func(resp *http.Response) error { return decode(resp, &v) })
}

// StartKeyJob starts a job, or goes on with the same one that was started before
// and has not ended. It returns at once.
func (c *Client) StartKeyJob(ctx context.Context, spec KeyJobSpec) (j KeyJob, err error) {
	r, err := operatorPost(keysPath+"jobs", spec)
	if err != nil {
		return j, err
	}
	return j, c.getJSON(ctx, r, &j)
}

// KeyJob returns a job.
func (c *Client) KeyJob(ctx context.Context, id string) (j KeyJob, err error) {
	return j, c.getJSON(ctx, operatorGet(keysPath+"jobs/"+id), &j)
}

// KeyJobs returns the jobs of the region, the latest first.
func (c *Client) KeyJobs(ctx context.Context) ([]KeyJob, error) {
	var list struct {
		Data []KeyJob `json:"data"`
	}
	err := c.getJSON(ctx, operatorGet(keysPath+"jobs"), &list)
	return list.Data, err
}

// RetireKEK ends the versions of a KEK before one, or the whole KEK when before
// is empty. While something needs them it is [ErrConflict], and the [Problem]
// names some of it; a dry run tells it in the result.
func (c *Client) RetireKEK(ctx context.Context, id kms.Identity, before string, dryRun bool) (k KeyRetirement, err error) {
	r, err := operatorPost(keysPath+"retire", struct {
		kms.Identity

		Before string `json:"before"`
		DryRun bool   `json:"dry_run"`
	}{id, before, dryRun})
	if err != nil {
		return k, err
	}
	return k, c.getJSON(ctx, r, &k)
}

// ShredKeys destroys the keys of an app for ever, or of one of its users when one
// is named. What they sealed can never be opened again.
func (c *Client) ShredKeys(ctx context.Context, app, user string) error {
	r, err := operatorPost(keysPath+"shred", struct {
		App  string `json:"app"`
		User string `json:"user"`
	}{app, user})
	if err != nil {
		return err
	}
	var done struct {
		Done bool `json:"done"`
	}
	if err := c.getJSON(ctx, r, &done); err != nil {
		return err
	}
	if !done.Done {
		return fmt.Errorf("%w: the answer does not confirm it", ErrProtocol)
	}
	return nil
}

// KeyBackups returns the kept copies of the keyring that are registered.
func (c *Client) KeyBackups(ctx context.Context) ([]KeyBackup, error) {
	var list struct {
		Data []KeyBackup `json:"data"`
	}
	err := c.getJSON(ctx, operatorGet(keysPath+"backups"), &list)
	return list.Data, err
}

// AddKeyBackup registers a copy of the keyring which is kept until a time: what
// wraps the keys in it is not retired before.
func (c *Client) AddKeyBackup(ctx context.Context, id string, until time.Time) (b KeyBackup, err error) {
	r, err := operatorPost(keysPath+"backups", struct {
		ID    string    `json:"id"`
		Until time.Time `json:"until"`
	}{id, until})
	if err != nil {
		return b, err
	}
	return b, c.getJSON(ctx, r, &b)
}

// EndKeyBackup says that a copy of the keyring was destroyed.
func (c *Client) EndKeyBackup(ctx context.Context, id string) error {
	r, err := operatorPost(keysPath+"backups", struct {
		ID        string `json:"id"`
		Destroyed bool   `json:"destroyed"`
	}{id, true})
	if err != nil {
		return err
	}
	var b KeyBackup
	return c.getJSON(ctx, r, &b)
}

// lines makes one attempt at an answer of JSON lines, of any length.
func (c *Client) lines(ctx context.Context, r request, fn func(line []byte) error) error {
	resp, err := c.send(ctx, r)
	if err != nil {
		return err
	}
	defer drain(resp)
	in := bufio.NewReaderSize(resp.Body, 64<<10)
	var long []byte
	for {
		line, err := readLine(in, &long)
		switch {
		case errors.Is(err, io.EOF):
			return nil // whether it was the whole, the lines tell
		case err != nil && ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return &connectionError{err: fmt.Errorf("the answer was cut: %w", err)}
		}
		if err := fn(line); err != nil {
			return err
		}
	}
}
