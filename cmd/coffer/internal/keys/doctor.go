package keys

import (
	"context"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// Finding is something that Doctor saw.
type Finding struct {
	Level  string `json:"level"` // ok, warning, problem
	Check  string `json:"check"`
	Detail string `json:"detail"`
}

// Doctor looks for what an operator should do something about.
func (a *Admin) Doctor(ctx context.Context, region string) ([]Finding, error) {
	s, err := a.Status(ctx, region)
	if err != nil {
		return nil, err
	}
	var out []Finding
	say := func(level, check, format string, args ...any) {
		out = append(out, Finding{Level: level, Check: check, Detail: fmt.Sprintf(format, args...)})
	}
	for _, u := range s.Unknown {
		say("problem", "kek", "the KEK of %s has not answered since the start: %s", u.Setting, u.Error)
	}
	if primary := a.Primary(); primary != (kms.Identity{}) && a.strayed() {
		say("warning", "configuration", "new apps go under %s since a migration: let kms name it in the configuration", primary)
	}
	for _, kek := range s.KEKs {
		name, wraps := kek.Identity.String(), 0
		for _, n := range kek.Versions {
			wraps += n
		}
		switch {
		case !kek.Configured:
			say("problem", "kek", "%d wraps are under %s, which no setting names: add it to the configuration", wraps, name)
		case kek.Error != "":
			say("problem", "kek", "%s: %s", name, kek.Error)
		case kek.Description.State != kms.StateEnabled:
			say("problem", "kek", "%s is %s", name, kek.Description.State)
		default:
			behind := wraps - kek.Versions[kek.Description.Version]
			if behind > 0 {
				say("warning", "kek", "%s: %d of %d wraps are under older versions than %s: rewrap", name, behind, wraps, kek.Description.Version)
			} else {
				say("ok", "kek", "%s: %d wraps, all under version %s", name, wraps, kek.Description.Version)
			}
		}
	}
	if s.Bridged > 0 {
		say("warning", "cache", "%d app keys are used past their revalidation since %s", s.Bridged, s.Since.UTC().Format(time.RFC3339))
	}
	if s.Job != nil && s.Job.State != Done {
		level := "ok"
		if s.Job.State == Failed || s.Job.State == Stopped {
			level = "problem"
		}
		say(level, "job", "%s %s is %s: %s", s.Job.Kind, s.Job.ID, s.Job.State, s.Job.Error)
	}
	return out, nil
}
