package server

import (
	"errors"
	"net/http"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/cmd/coffer/internal/profiles"
)

// profileView is a profile as it is sent back.
type profileView struct {
	User    string        `json:"user"`
	Profile profileObject `json:"profile" doc:"as it was stored"`
	Created string        `json:"created"`
	Changed string        `json:"changed"`
	Ends    string        `json:"ends" doc:"when it ends without another use; a use is noticed to a day"`
}

// profileObject is a JSON object that is passed on as it is.
type profileObject struct{ jsontext.Value }

// MarshalJSON gives the object.
func (p profileObject) MarshalJSON() ([]byte, error) { return p.Value, nil }

func viewProfile(p profiles.Profile) profileView {
	return profileView{
		User: p.User, Profile: profileObject{p.Content}, Created: p.Created.UTC().Format(timeLayout),
		Changed: p.Changed.UTC().Format(timeLayout), Ends: p.Ends.UTC().Format(timeLayout),
	}
}

// showProfile answers with a user's profile, which is a use of it.
func (s *Server) showProfile(c *call) error {
	_, tag, err := s.userOf(c, c.vars["user"], "user")
	if err != nil {
		return err
	}
	p, err := s.profiles.Get(c.r.Context(), c.app.ID, tag, s.inBackground)
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, viewProfile(p))
}

// storeProfile takes a profile in place of the one before.
func (s *Server) storeProfile(c *call) error {
	user, tag, err := s.userOf(c, c.vars["user"], "user")
	if err != nil {
		return err
	}
	if _, err := s.bodyForm(c.r, c.route.bodies); err != nil {
		return err
	}
	body, release, err := s.readBody(c.w, c.r, c.route.limit)
	if err != nil {
		return err
	}
	defer release()
	content := jsontext.Value(body).Clone()
	if err := content.Compact(); err != nil {
		return s.invalidBody("", "the body is not a JSON object without duplicate names")
	}
	p, created, err := s.profiles.Put(c.r.Context(), c.app.ID, user, tag, content)
	if errors.Is(err, profiles.ErrInvalid) {
		return s.invalidBody("", err.Error())
	}
	if err != nil {
		return err
	}
	status := http.StatusOK
	if created {
		status = http.StatusCreated
	}
	return s.writeJSON(c, status, viewProfile(p))
}

func (s *Server) deleteProfile(c *call) error {
	_, tag, err := s.userOf(c, c.vars["user"], "user")
	if err != nil {
		return err
	}
	if err := s.profiles.Delete(c.r.Context(), c.app.ID, tag); err != nil {
		return err
	}
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}
