package journal

import "context"

// StaleRoute returns an append on the route that the app has now, whatever becomes
// of it: what a process does that has not noticed a plan change.
func (j *Journal) StaleRoute(ctx context.Context, app AppID) (func(context.Context, ...Event) ([]Result, error), error) {
	r, err := j.openRoute(ctx, app)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, events ...Event) ([]Result, error) { return j.appendOn(ctx, r, app, events) }, nil
}
