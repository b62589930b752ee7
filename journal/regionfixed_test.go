package journal

import (
	"errors"
	"testing"

	"github.com/go-json-experiment/json"
	"pgregory.net/rapid"
)

// TestRegionIsForEver: no sequence of what operators can do to apps changes an
// app's region: neither in what is told of it, nor in its row, nor in its id.
func TestRegionIsForEver(t *testing.T) {
	r := newTestRegistry(t)
	rapid.Check(t, func(rt *rapid.T) {
		ctx := t.Context()
		first, err := r.Create(ctx, AppSpec{Plan: "pro", Account: "acme"})
		if err != nil {
			rt.Fatal(err)
		}
		apps := []AppID{first.ID}
		steps := rapid.IntRange(1, 25).Draw(rt, "steps")
		for range steps {
			id := NewAppID(rapid.SampledFrom([]byte{1, 2, 4, 200}).Draw(rt, "another region"))
			if n := len(apps); n > 0 && rapid.IntRange(0, 9).Draw(rt, "own") > 0 {
				id = apps[rapid.IntRange(0, n-1).Draw(rt, "app")]
			}
			foreign := id.Region() != r.region.Number
			var err error
			switch op := rapid.IntRange(0, 6).Draw(rt, "operation"); op {
			case 0:
				spec := AppSpec{Plan: rapid.SampledFrom([]string{"free", "pro"}).Draw(rt, "plan"), Account: "acme"}
				if foreign = foreign && rapid.Bool().Draw(rt, "foreign id"); foreign {
					spec.ID = id
				}
				var app App
				if app, err = r.Create(ctx, spec); err == nil {
					apps = append(apps, app.ID)
				}
			case 1, 2:
				_, err = r.SetDisabled(ctx, id, op == 1)
			case 3:
				_, err = r.RotateCertificate(ctx, id)
			case 4:
				_, err = r.WithdrawCertificate(ctx, id)
			case 5:
				_, err = r.BeginDelete(ctx, id)
			case 6:
				_, err = r.EndDelete(ctx, id)
			}
			if foreign && !errors.Is(err, ErrWrongRegion) {
				rt.Fatalf("an app of region %d: %v", id.Region(), err)
			}
			for _, id := range apps {
				row, err := r.loadRow(ctx, id)
				if err != nil {
					rt.Fatal(err)
				}
				var stored struct {
					Region string `json:"region"`
				}
				if err := json.Unmarshal(row.Value, &stored); err != nil || stored.Region != r.region.ID || id.Region() != r.region.Number {
					rt.Fatalf("app %s: its row says region %q, %v", id, stored.Region, err)
				}
				app, err := r.App(ctx, id)
				if err == nil && (app.Region != r.region.ID || app.ID != id) || err != nil && !errors.Is(err, ErrUnknownApp) {
					rt.Fatalf("app %s: %+v, %v", id, app, err)
				}
			}
		}
	})
}
