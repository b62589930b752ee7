package deletion

import (
	"context"
	"errors"
	"fmt"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// The names of the steps, as rows have them.
const (
	stepMark         = "mark"
	stepKeys         = "keys"
	stepRows         = "rows"
	stepMessages     = "messages"
	stepViews        = "views"
	stepRest         = "rest"
	stepApps         = "apps"
	stepRegistration = "registration"
	stepEnd          = "end"
)

// ownedRows are the prefixes of the registry's rows that an app owns.
func ownedRows(app journal.AppID) []string {
	id := app.String()
	return []string{
		"endpoint." + id + ".", "replay." + id + ".", "presend." + id, // callbacks
		"export." + id + "-", "job.export." + id + "-",
		"job.move." + id,
		"recall." + id + ".",
		"erasing." + id + ".", "erasure." + id + ".",
	}
}

// appSteps are the steps of every app, in order.
func (d *Deletions) appSteps(views Views, more []Step) []Step {
	registry := d.journal.Registry
	steps := []Step{
		{Name: stepMark, Do: func(ctx context.Context, app journal.AppID) (int, error) {
			_, err := registry().BeginDelete(ctx, app)
			return 0, err
		}},
		{Name: stepKeys, Do: func(ctx context.Context, app journal.AppID) (int, error) {
			err := d.journal.Keyring().DestroyApp(ctx, app.String())
			if errors.Is(err, kms.ErrAppUnknown) {
				err = nil // an app whose creation was interrupted
			}
			return 0, err
		}},
		{Name: stepRows, Do: d.deleteRows, Count: d.countRows},
	}
	steps = append(steps, more...)
	purge := func(ctx context.Context, app journal.AppID) (int, error) { return d.journal.PurgeApp(ctx, app, nil) }
	return append(steps,
		Step{Name: stepMessages, Do: purge, Count: d.journal.CountApp},
		Step{Name: stepViews, Do: func(ctx context.Context, app journal.AppID) (int, error) { return 0, views.Forget(ctx, app) }},
		// A process that learned late of the end may have appended one more.
		Step{Name: stepRest, Do: purge},
		Step{Name: stepEnd, Do: func(ctx context.Context, app journal.AppID) (int, error) {
			_, err := registry().EndDelete(ctx, app)
			return 0, err
		}},
	)
}

func (d *Deletions) deleteRows(ctx context.Context, app journal.AppID) (int, error) {
	count := 0
	for _, prefix := range ownedRows(app) {
		for name, err := range d.rows.List(ctx, prefix) {
			if err == nil {
				err = d.deleteRow(ctx, name)
			}
			if err != nil {
				return count, err
			}
			count++
		}
	}
	return count, nil
}

func (d *Deletions) deleteRow(ctx context.Context, name string) error {
	for {
		row, err := d.rows.Load(ctx, name)
		if err == nil {
			err = d.rows.Delete(ctx, name, row.Revision)
		}
		switch {
		case errors.Is(err, kms.ErrRowNotFound):
			return nil
		case errors.Is(err, kms.ErrRowConflict):
			continue
		case err != nil:
			return fmt.Errorf("delete row %s: %w", name, err)
		}
		return nil
	}
}

func (d *Deletions) countRows(ctx context.Context, app journal.AppID) (int, error) {
	count := 0
	for _, prefix := range ownedRows(app) {
		for _, err := range d.rows.List(ctx, prefix) {
			if err != nil {
				return 0, err
			}
			count++
		}
	}
	return count, nil
}

// bound is a step of one job.
type bound struct {
	name string
	do   func(context.Context) (int, error)
}

func (d *Deletions) bound(app journal.AppID) []bound {
	steps := make([]bound, len(d.steps))
	for i, step := range d.steps {
		steps[i] = bound{step.Name, func(ctx context.Context) (int, error) { return step.Do(ctx, app) }}
	}
	return steps
}

// accountSteps are the steps of an account.
func (d *Deletions) accountSteps(id string) []bound {
	return []bound{
		{stepMark, func(ctx context.Context) (int, error) { return 0, d.accounts.BeginDelete(ctx, id) }},
		{stepApps, func(ctx context.Context) (int, error) { return d.deleteApps(ctx, id) }},
		{stepRegistration, func(ctx context.Context) (int, error) { return 0, d.accounts.DestroyKeys(ctx, id) }},
		{stepEnd, func(ctx context.Context) (int, error) { return 0, d.accounts.EndDelete(ctx, id) }},
	}
}

// deleteApps deletes the apps of an account. All are marked before the first is
// taken apart: an account has no app that still answers.
func (d *Deletions) deleteApps(ctx context.Context, account string) (int, error) {
	apps, err := d.journal.Registry().AppsOf(ctx, account)
	if err != nil {
		return 0, err
	}
	for _, app := range apps {
		if _, err := d.journal.Registry().BeginDelete(ctx, app); err != nil {
			return 0, err
		}
	}
	count := 0
	for _, app := range apps {
		for _, step := range d.bound(app) {
			d.at("before " + stepApps + "/" + step.name)
			n, err := step.do(ctx)
			if err != nil {
				return count, fmt.Errorf("app %s: %s: %w", app, step.name, err)
			}
			count += n
		}
		count++
	}
	return count, nil
}
