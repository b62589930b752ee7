package server

import (
	"context"
	"net/http"
	"time"

	"github.com/cofferdb/coffer/journal"
)

type changeAppBody struct {
	Disabled bool   `json:"disabled,omitempty"`
	OnRecall string `json:"on_recall,omitempty" doc:"hide, or erase"`
}

// changeApp disables or enables an app: a disabled one neither takes nor serves
// anything, and loses nothing. It also says what recalls do.
func (s *Server) changeApp(c *call) error {
	id, err := s.appOfPath(c.vars["app"])
	if err != nil {
		return err
	}
	var in struct {
		Disabled *bool             `json:"disabled"`
		OnRecall *journal.OnRecall `json:"on_recall"`
	}
	if err := s.decode(c, &in); err != nil {
		return err
	}
	if in.Disabled == nil && in.OnRecall == nil {
		return s.invalidBody("/disabled", "true or false is required, or on_recall")
	}
	var app journal.App
	if in.OnRecall != nil {
		if *in.OnRecall != journal.RecallHides && *in.OnRecall != journal.RecallErases {
			return s.invalidBody("/on_recall", "hide or erase")
		}
		if app, err = s.journal.Registry().SetOnRecall(c.r.Context(), id, *in.OnRecall); err != nil {
			return err
		}
		s.audit(c, "app.on_recall", "app:"+id.String(), map[string]string{"on_recall": string(*in.OnRecall)})
	}
	if in.Disabled != nil {
		if app, err = s.journal.Registry().SetDisabled(c.r.Context(), id, *in.Disabled); err != nil {
			return err
		}
		s.changes.ring()
		s.audit(c, map[bool]string{true: "app.disabled", false: "app.enabled"}[app.Disabled], "app:"+id.String(), nil)
	}
	return s.writeJSON(c, http.StatusOK, viewApp(app))
}

// rotateCertificate makes a new certificate, told this once. The one before it
// goes on being accepted until it is withdrawn.
func (s *Server) rotateCertificate(c *call) error {
	id, err := s.appOfPath(c.vars["app"])
	if err != nil {
		return err
	}
	app, err := s.journal.Registry().RotateCertificate(c.r.Context(), id)
	if err != nil {
		return err
	}
	s.audit(c, "app.certificate_rotated", "app:"+id.String(), nil)
	view := viewApp(app)
	view.Certificates = []string{app.Certificates[0].Reveal()}
	return s.writeJSON(c, http.StatusCreated, view)
}

// withdrawCertificate ends the certificate before the newest: tokens that it has
// signed are refused from now on.
func (s *Server) withdrawCertificate(c *call) error {
	id, err := s.appOfPath(c.vars["app"])
	if err != nil {
		return err
	}
	before, err := s.journal.App(c.r.Context(), id)
	if err != nil {
		return err
	}
	app, err := s.journal.Registry().WithdrawCertificate(c.r.Context(), id)
	if err != nil {
		return err
	}
	if len(before.Certificates) > 1 {
		s.audit(c, "app.certificate_withdrawn", "app:"+id.String(), nil)
	}
	return s.writeJSON(c, http.StatusOK, viewApp(app))
}

// useAccount counts a request of an app as a use of its account.
func (s *Server) useAccount(c *call, app journal.App) error {
	return s.accounts.Use(c.r.Context(), app.Account, s.inBackground)
}

// backgroundTimeout bounds what a request leaves to be done after its answer.
const backgroundTimeout = 10 * time.Second

// inBackground runs f beside the request that caused it. [Server.Wait] waits.
func (s *Server) inBackground(f func(context.Context)) {
	s.sockets.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), backgroundTimeout)
		defer cancel()
		f(ctx)
	})
}
