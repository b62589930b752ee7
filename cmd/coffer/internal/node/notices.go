package node

import (
	"context"
	"errors"
	"fmt"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/cmd/coffer/internal/profiles"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// What Coffer does to an app by itself it tells in the app's own log
// (docs/adr/0025-operational-events.md). The id of such an event is made of what
// happened, and no caller can give it, so that whoever may have told already, in
// another process or in an earlier life of this one, it is told once.

// tell appends such an event. An app that takes no events, or no more, is not told.
func (r *region) tell(ctx context.Context, app journal.AppID, event journal.Event) error {
	results, err := r.journal.Append(ctx, app, event)
	if err == nil {
		err = results[0].Err
	}
	for _, settled := range []error{
		journal.ErrConflict, // told, when the retention was another
		journal.ErrDisabled, journal.ErrUnknownApp, kms.ErrAppDestroyed, kms.ErrSubjectErased,
	} {
		if errors.Is(err, settled) {
			return nil
		}
	}
	return err
}

const noticeTime = "2006-01-02T15:04:05.000Z"

// tellAccounts returns what tells the apps of an account of its end. The apps are
// looked up once, and only if there is an account to tell of.
func (r *region) tellAccounts() func(context.Context, accounts.Warning) error {
	var apps map[string][]journal.AppID
	return func(ctx context.Context, w accounts.Warning) (err error) {
		if apps == nil {
			if apps, err = r.journal.Registry().AppsByAccount(ctx); err != nil {
				return r.untold(journal.AccountExpiring, err, "account", w.ID)
			}
		}
		data, err := json.Marshal(struct {
			Account string `json:"account"`
			Ends    string `json:"ends"`
		}{w.ID, w.Ends.UTC().Format(noticeTime)})
		if err != nil {
			return fmt.Errorf("event of an account: %w", err)
		}
		var failed error
		for _, app := range apps[w.ID] {
			err := r.tell(ctx, app, journal.Event{
				ID: fmt.Sprintf("coffer:account-expiring:%s:%d", w.ID, w.Used.UnixMilli()), Type: journal.AccountExpiring, Data: data,
			})
			failed = errors.Join(failed, r.untold(journal.AccountExpiring, err, "account", w.ID, "app", app.String()))
		}
		return failed
	}
}

// tellProfile tells an app of the end of a profile. The event is the user's: it is
// sealed under the user's key, and goes with the user.
func (r *region) tellProfile(ctx context.Context, w profiles.Warning) error {
	user, err := w.User(ctx)
	if errors.Is(err, kms.ErrSubjectErased) || errors.Is(err, kms.ErrAppDestroyed) {
		return nil
	}
	if err != nil {
		return r.untold(journal.ProfileExpiring, err, "app", w.App.String())
	}
	data, err := json.Marshal(struct {
		Ends string `json:"ends"`
	}{w.Ends.UTC().Format(noticeTime)})
	if err != nil {
		return fmt.Errorf("event of a profile: %w", err)
	}
	err = r.tell(ctx, w.App, journal.Event{
		ID:   fmt.Sprintf("coffer:profile-expiring:%s:%d", w.Subject, w.Used.UnixMilli()),
		Type: journal.ProfileExpiring, Sender: user, Data: data,
	})
	return r.untold(journal.ProfileExpiring, err, "app", w.App.String())
}

// untold says that an event could not be appended, and is tried again.
func (r *region) untold(t journal.Type, err error, of ...any) error {
	if err != nil {
		r.log.Warn("an app is not told yet", append([]any{"event", t.String(), "err", err}, of...)...)
	}
	return err
}
