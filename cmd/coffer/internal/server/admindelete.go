package server

import (
	"net/http"
	"strconv"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deletion"
	"github.com/cofferdb/coffer/journal"
)

// wouldDelete is the answer to a dry run: how much there is of each kind.
type wouldDelete struct {
	Apps []wouldDeleteApp `json:"apps"`
}

type wouldDeleteApp struct {
	App    string         `json:"app"`
	Counts map[string]int `json:"counts"`
}

// deleteApp begins to delete an app, or tells what would go.
func (s *Server) deleteApp(c *call) error {
	id, err := s.appOfPath(c.vars["app"])
	if err != nil {
		return err
	}
	dry, err := s.dryRun(c)
	if err != nil {
		return err
	}
	if dry {
		if _, err := s.journal.Registry().App(c.r.Context(), id); err != nil {
			return err
		}
		return s.countApps(c, []journal.AppID{id})
	}
	job, err := s.deletions.StartApp(c.r.Context(), id, c.caller.actor())
	if err != nil {
		return err
	}
	return s.deletionBegun(c, job)
}

// deleteAccount begins to delete an account with its apps, or tells what would
// go.
func (s *Server) deleteAccount(c *call) error {
	dry, err := s.dryRun(c)
	if err != nil {
		return err
	}
	account := c.vars["account"]
	if dry {
		if err := s.accounts.Known(c.r.Context(), account); err != nil {
			return err
		}
		apps, err := s.journal.Registry().AppsOf(c.r.Context(), account)
		if err != nil {
			return err
		}
		return s.countApps(c, apps)
	}
	job, err := s.deletions.StartAccount(c.r.Context(), account, c.caller.actor())
	if err != nil {
		return err
	}
	return s.deletionBegun(c, job)
}

func (s *Server) dryRun(c *call) (bool, error) {
	text := c.query.Get("dry_run")
	if text == "" {
		return false, nil
	}
	dry, err := strconv.ParseBool(text)
	if err != nil {
		return false, s.invalidParameter("dry_run", "true or false")
	}
	return dry, nil
}

func (s *Server) countApps(c *call, apps []journal.AppID) error {
	answer := wouldDelete{Apps: []wouldDeleteApp{}}
	for _, app := range apps {
		counts, err := s.deletions.Count(c.r.Context(), app)
		if err != nil {
			return err
		}
		answer.Apps = append(answer.Apps, wouldDeleteApp{app.String(), counts})
	}
	return s.writeJSON(c, http.StatusOK, answer)
}

func (s *Server) deletionBegun(c *call, job deletion.Job) error {
	c.w.Header().Set("Location", "/v1/admin/deletions/"+job.ID)
	return s.writeJSON(c, http.StatusAccepted, job)
}

func (s *Server) listDeletions(c *call) error {
	jobs, err := s.deletions.Jobs(c.r.Context())
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, list[deletion.Job]{Data: jobs})
}

func (s *Server) showDeletion(c *call) error {
	if err := s.notElsewhere(c.vars["deletion"]); err != nil { // that of an app has its id
		return err
	}
	job, err := s.deletions.Job(c.r.Context(), c.vars["deletion"])
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, job)
}
