package erasures

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// finish does what is still to be done of an erasure, in an order in which each
// step may be repeated.
func (e *Erasures) finish(ctx context.Context, p pendingRow) (Erasure, error) {
	app, subject, err := p.place()
	if err != nil {
		return Erasure{}, err
	}
	user, err := e.o.Journal.Keyring().OpenBlob(ctx, p.App, purpose, p.User)
	if err != nil {
		return Erasure{}, err
	}
	if err := e.destroy(ctx, app, subject); err != nil {
		return Erasure{}, err
	}
	receipt := Receipt{
		Version: version, Erasure: erasureID(p.Subject, p.Number), Region: e.o.Region.ID, App: p.App, Subject: p.Subject, Requested: p.Requested,
		Destroyed: []Destroyed{{What: "the subject key, under which every event, attachment and profile of the user is sealed", Where: "keyring"}},
	}
	for _, also := range e.o.Also {
		destroyed, err := also(ctx, app, string(user))
		if err != nil {
			return Erasure{}, err
		}
		if destroyed.What != "" {
			receipt.Destroyed = append(receipt.Destroyed, destroyed)
		}
	}
	if err := e.tell(ctx, app, string(user), receipt.Erasure); err != nil {
		return Erasure{}, err
	}
	if receipt.Remains, err = e.remains(ctx, app); err != nil {
		return Erasure{}, err
	}
	receipt.Completed = e.now()
	return e.complete(ctx, p, receipt)
}

func (p pendingRow) place() (app journal.AppID, subject kms.Tag, err error) {
	if app, err = journal.ParseAppID(p.App); err == nil {
		subject, err = kms.ParseTag(p.Subject)
	}
	if err != nil || p.Version != version {
		err = fmt.Errorf("%w: %s%s.%s", ErrCorrupt, pendingPrefix, p.App, p.Subject)
	}
	return app, subject, err
}

// destroy ends the subject's key, and notes how far the keyring had come.
func (e *Erasures) destroy(ctx context.Context, app journal.AppID, subject kms.Tag) error {
	if err := e.o.Journal.Keyring().EraseSubject(ctx, app.String(), subject); err != nil {
		return err
	}
	at, err := e.o.KeyringAt(ctx)
	if err != nil {
		return err
	}
	return e.noteHead(ctx, at, false)
}

// noteHead writes how far the keyring had come at an erasure; back lets it go
// back to where a restored one is.
func (e *Erasures) noteHead(ctx context.Context, at uint64, back bool) error {
	for {
		var head headRecord
		revision, err := e.load(ctx, headRow, &head)
		if errors.Is(err, kms.ErrRowNotFound) {
			err = e.create(ctx, headRow, headRecord{Keyring: at})
		} else if err == nil {
			if head.Keyring == at || head.Keyring > at && !back {
				return nil
			}
			var value []byte
			if value, err = json.Marshal(headRecord{Keyring: at}); err == nil {
				_, err = e.o.Rows.Update(ctx, headRow, value, revision)
			}
		}
		if !errors.Is(err, kms.ErrRowConflict) {
			return err
		}
	}
}

// tell appends the event of the erasure. It is the app's own, so it can be read
// when the user's events cannot.
func (e *Erasures) tell(ctx context.Context, app journal.AppID, user, erasure string) error {
	data, err := json.Marshal(map[string]string{"erasure": erasure}, json.Deterministic(true))
	if err != nil {
		return fmt.Errorf("erasures: %w", err)
	}
	results, err := e.o.Journal.Append(ctx, app, journal.Event{ID: "erasure:" + erasure, Type: journal.UserErased, Recipient: user, Data: data})
	switch {
	case err == nil:
		return results[0].Err
	case errors.Is(err, journal.ErrDisabled):
		return nil // a disabled app is told nothing; its users can be erased
	}
	return err
}

// remains lists what is left and cannot be opened, or only with a copy of the
// keyring.
func (e *Erasures) remains(ctx context.Context, id journal.AppID) ([]Remains, error) {
	app, err := e.o.Journal.App(ctx, id)
	if err != nil {
		return nil, err
	}
	now := e.now()
	plan, _ := e.o.Journal.Plan(app.Plan)
	left := []Remains{
		{What: "sealed events that nothing opens", Where: "streams and views", Until: now.Add(plan.Retention)},
		{What: "sealed attachments that nothing opens", Where: "object store", Until: now.Add(e.o.Journal.Retention().Attachments)},
	}
	if e.o.Copies == nil {
		return left, nil
	}
	copies, err := e.o.Copies(ctx)
	return append(left, copies...), err
}

// complete writes the receipt and takes the erasure off what is to be done.
func (e *Erasures) complete(ctx context.Context, p pendingRow, receipt Receipt) (Erasure, error) {
	text, err := e.o.Signing.Sign(ctx, ReceiptType, receipt)
	if err != nil {
		return Erasure{}, err
	}
	if err := e.audit(ctx, p.Actor, "user.erased", p.App, p.Subject, receipt.Erasure); err != nil {
		return Erasure{}, err
	}
	done := doneRow{Version: version, Number: p.Number, Requested: p.Requested, Completed: receipt.Completed, Receipt: text}
	name := donePrefix + p.App + "." + p.Subject
	var before doneRow
	revision, err := e.load(ctx, name, &before)
	switch {
	case errors.Is(err, kms.ErrRowNotFound):
		err = e.create(ctx, name, done)
	case err == nil && before.Number >= p.Number:
		done = before // another process has finished it
	case err == nil:
		var value []byte
		if value, err = json.Marshal(done, json.Deterministic(true)); err == nil {
			_, err = e.o.Rows.Update(ctx, name, value, revision)
		}
	}
	if err != nil {
		return Erasure{}, fmt.Errorf("erasures: %w", err)
	}
	row, err := e.o.Rows.Load(ctx, pendingPrefix+p.App+"."+p.Subject)
	if err == nil {
		err = e.o.Rows.Delete(ctx, pendingPrefix+p.App+"."+p.Subject, row.Revision)
	}
	if err != nil && !errors.Is(err, kms.ErrRowNotFound) && !errors.Is(err, kms.ErrRowConflict) {
		return Erasure{}, fmt.Errorf("erasures: %w", err)
	}
	return done.erasure(p.Subject), nil
}

// Run finishes the erasures that were interrupted, until ctx ends.
func (e *Erasures) Run(ctx context.Context) {
	look := time.NewTicker(retryEvery)
	defer look.Stop()
	for {
		if err := e.finishAll(ctx); err != nil && ctx.Err() == nil {
			e.o.Log.Warn("erasures are not done yet", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		case <-e.wakeup:
		}
	}
}

func (e *Erasures) finishAll(ctx context.Context) error {
	var failed error
	for name, err := range e.o.Rows.List(ctx, pendingPrefix) {
		if err != nil {
			return fmt.Errorf("erasures: %w", err)
		}
		var p pendingRow
		if _, err = e.load(ctx, name, &p); err == nil {
			_, err = e.finish(ctx, p)
		}
		if err != nil && !errors.Is(err, kms.ErrRowNotFound) {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}

// Settle sees to it that restored backups stay erased. It is called before the
// region listens: when the keyring's stream ends before where it was at the last
// erasure, every erasure is done again. It returns how many were.
func (e *Erasures) Settle(ctx context.Context) (int, error) {
	var head headRecord
	if _, err := e.load(ctx, headRow, &head); err != nil {
		if errors.Is(err, kms.ErrRowNotFound) {
			return 0, nil
		}
		return 0, err
	}
	at, err := e.o.KeyringAt(ctx)
	if err != nil || at >= head.Keyring {
		return 0, err
	}
	e.o.Log.Warn("the keyring is older than the last erasure; every erasure is done again")
	again := 0
	for name, err := range e.o.Rows.List(ctx, donePrefix) {
		if err != nil {
			return again, fmt.Errorf("erasures: %w", err)
		}
		var done doneRow
		if _, err := e.load(ctx, name, &done); err != nil {
			return again, err
		}
		appText, digits, _ := strings.Cut(strings.TrimPrefix(name, donePrefix), ".")
		app, subject, err := pendingRow{Version: version, App: appText, Subject: digits}.place()
		if err != nil {
			return again, err
		}
		did, err := e.again(ctx, app, subject, done.Requested, !done.Registered.IsZero())
		if err != nil {
			return again, err
		}
		if did {
			again++
		}
	}
	return again, e.noteHead(ctx, at, true)
}

// again destroys what a restored keyring brought back, and reports whether there
// was something: a copy that knows of the erasure is left as it is. A user that
// came back meanwhile gets a new key: the one it had is not in the copy.
func (e *Erasures) again(ctx context.Context, app journal.AppID, subject kms.Tag, requested time.Time, registered bool) (bool, error) {
	keyring := e.o.Journal.Keyring()
	state, err := keyring.SubjectState(ctx, app.String(), subject)
	if err != nil {
		return false, err
	}
	if !state.Erased.IsZero() && !state.Erased.Before(requested.Truncate(time.Second)) {
		return false, nil
	}
	err = e.destroy(ctx, app, subject)
	if errors.Is(err, kms.ErrAppUnknown) || errors.Is(err, kms.ErrAppDestroyed) {
		return false, nil
	}
	if err == nil && registered {
		_, err = keyring.RegisterSubject(ctx, app.String(), subject)
	}
	return err == nil, err
}

// Apply does the erasure of a receipt again, on a region that was restored from
// a backup made before it.
func (e *Erasures) Apply(ctx context.Context, text string) (Receipt, error) {
	var r Receipt
	if err := e.o.Signing.Verify(ctx, ReceiptType, text, &r); err != nil {
		return r, fmt.Errorf("%w: %w", ErrReceipt, err)
	}
	app, subject, err := pendingRow{Version: r.Version, App: r.App, Subject: r.Subject}.place()
	if err != nil || r.Region != e.o.Region.ID {
		return r, fmt.Errorf("%w: of region %s", ErrReceipt, r.Region)
	}
	var done doneRow
	_, err = e.load(ctx, donePrefix+suffix(app, subject), &done)
	if err == nil && !done.Registered.IsZero() && done.Registered.After(r.Completed) {
		return r, nil // the user came back after it
	}
	if err != nil && !errors.Is(err, kms.ErrRowNotFound) {
		return r, err
	}
	if _, err := e.again(ctx, app, subject, r.Requested, false); err != nil {
		return r, err
	}
	if errors.Is(err, kms.ErrRowNotFound) {
		number := 1
		if _, digits, ok := strings.Cut(r.Erasure, "-"); ok {
			_, _ = fmt.Sscanf(digits, "%d", &number)
		}
		return r, e.create(ctx, donePrefix+suffix(app, subject), doneRow{
			Version: version, Number: number, Requested: r.Requested, Completed: r.Completed, Receipt: text,
		})
	}
	return r, nil
}

// Receipts calls fn with the receipt of every erasure of the region.
func (e *Erasures) Receipts(ctx context.Context, fn func(receipt string) error) error {
	for name, err := range e.o.Rows.List(ctx, donePrefix) {
		if err != nil {
			return fmt.Errorf("erasures: %w", err)
		}
		var done doneRow
		if _, err := e.load(ctx, name, &done); err != nil {
			return err
		}
		if err := fn(done.Receipt); err != nil {
			return err
		}
	}
	return nil
}
