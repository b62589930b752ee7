package server

import (
	"net/http"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/keys"
	"github.com/cofferdb/coffer/kms"
)

func (s *Server) keysStatus(c *call) error {
	status, err := s.keys.Status(c.r.Context(), s.region.ID)
	if err != nil {
		return err
	}
	if status.Job != nil {
		status.Job.Pending = nil
	}
	return s.writeJSON(c, http.StatusOK, status)
}

// keysInventory streams a line for each app, and one that says how many there
// were: without it the answer was cut.
func (s *Server) keysInventory(c *call) error {
	out := s.newLines(c)
	count := 0
	line := func(app keys.AppInventory) error {
		count++
		return out.encode(app)
	}
	var err error
	if c.query.Has("app") {
		if err := s.notElsewhere(c.query.Get("app")); err != nil {
			return err
		}
		var app keys.AppInventory
		if app, err = s.keys.InventoryOf(c.r.Context(), c.query.Get("app")); err == nil {
			err = line(app)
		}
	} else {
		err = s.keys.Inventory(c.r.Context(), line)
	}
	if err != nil {
		return err
	}
	var end struct {
		End struct {
			Count int `json:"count"`
		} `json:"end"`
	}
	end.End.Count = count
	if err := out.encode(end); err != nil {
		return err
	}
	return out.flush()
}

func (s *Server) keysRotate(c *call) error {
	version, err := s.keys.Rotate(c.r.Context(), c.caller.actor())
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, struct {
		kms.Identity

		Version string `json:"version"`
	}{s.keys.Primary(), version})
}

// keysStart answers when the job is durable; the region works on it.
func (s *Server) keysStart(c *call) error {
	var in struct {
		Kind   keys.Kind `json:"kind"`
		App    string    `json:"app"`
		To     string    `json:"to"`
		DryRun bool      `json:"dry_run"`
	}
	if err := s.decode(c, &in); err != nil {
		return err
	}
	if in.App != "" {
		if _, err := s.appOfPath(in.App); err != nil {
			return err
		}
	}
	job, err := s.keys.Start(c.r.Context(), keys.Spec{Kind: in.Kind, App: in.App, To: in.To, DryRun: in.DryRun, Actor: c.caller.actor()})
	if err != nil {
		return err
	}
	job.Pending = nil
	c.w.Header().Set("Location", "/v1/admin/keys/jobs/"+job.ID)
	return s.writeJSON(c, http.StatusAccepted, job)
}

func (s *Server) keysJobs(c *call) error {
	jobs, err := s.keys.Jobs(c.r.Context())
	if err != nil {
		return err
	}
	for i := range jobs {
		jobs[i].Pending = nil
	}
	return s.writeJSON(c, http.StatusOK, list[keys.Job]{Data: jobs})
}

func (s *Server) keysJob(c *call) error {
	job, err := s.keys.Job(c.r.Context(), c.vars["job"])
	if err != nil {
		return err
	}
	job.Pending = nil
	return s.writeJSON(c, http.StatusOK, job)
}

// keysRetire answers with what was found; a refusal is a problem that names some
// of what still needs the key.
func (s *Server) keysRetire(c *call) error {
	var in struct {
		Provider string `json:"provider"`
		Key      string `json:"key"`
		Before   string `json:"before"`
		DryRun   bool   `json:"dry_run"`
	}
	if err := s.decode(c, &in); err != nil {
		return err
	}
	found, err := s.keys.Retire(c.r.Context(), c.caller.actor(), kms.Identity{Provider: in.Provider, Key: in.Key}, in.Before, in.DryRun)
	if err != nil {
		p := s.problemOf(err)
		p.Needed, p.Uses = found.Needed, found.Uses
		return p
	}
	return s.writeJSON(c, http.StatusOK, found)
}

// keysShred destroys the keys of an app, or of one of its users.
func (s *Server) keysShred(c *call) error {
	var in struct {
		App  string `json:"app"`
		User string `json:"user"`
	}
	if err := s.decode(c, &in); err != nil {
		return err
	}
	app, err := s.appOfPath(in.App)
	if err != nil {
		return err
	}
	ctx := c.r.Context()
	if in.User == "" {
		err = s.keys.Shred(ctx, c.caller.actor(), app.String())
	} else {
		var tag kms.Tag
		if tag, err = s.journal.Tag(ctx, app, kms.KindSubject, in.User); err == nil {
			err = s.keys.ShredSubject(ctx, c.caller.actor(), app.String(), tag)
		}
	}
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, struct {
		App  string `json:"app"`
		User string `json:"user,omitempty"`
		Done bool   `json:"done"`
	}{app.String(), in.User, true})
}

func (s *Server) keysBackups(c *call) error {
	backups, err := s.keys.Backups(c.r.Context())
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, list[keys.Backup]{Data: backups})
}

// keysBackup registers a copy of the keyring, or takes one off the list.
func (s *Server) keysBackup(c *call) error {
	var in struct {
		ID        string    `json:"id"`
		Until     time.Time `json:"until"`
		Destroyed bool      `json:"destroyed"`
	}
	if err := s.decode(c, &in); err != nil {
		return err
	}
	ctx := c.r.Context()
	if in.Destroyed {
		if err := s.keys.EndBackup(ctx, c.caller.actor(), in.ID); err != nil {
			return err
		}
		return s.writeJSON(c, http.StatusOK, keys.Backup{ID: in.ID})
	}
	backup, err := s.keys.AddBackup(ctx, c.caller.actor(), in.ID, in.Until)
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusCreated, backup)
}

func (s *Server) keysDoctor(c *call) error {
	findings, err := s.keys.Doctor(c.r.Context(), s.region.ID)
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, list[keys.Finding]{Data: findings})
}
