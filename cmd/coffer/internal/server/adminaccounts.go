package server

import (
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
)

func (s *Server) listAccounts(c *call) error {
	found, err := s.accounts.Accounts(c.r.Context())
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, list[accounts.Account]{Data: found})
}

func (s *Server) showAccount(c *call) error {
	account, err := s.accounts.Account(c.r.Context(), c.vars["account"])
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, account)
}

type createAccountBody struct {
	ID      string   `json:"id" required:""`
	Name    string   `json:"name"`
	Email   string   `json:"email"`
	Home    string   `json:"home"`
	Regions []string `json:"regions"`
}

func (s *Server) createAccount(c *call) error {
	var in createAccountBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	account, err := s.accounts.Create(c.r.Context(), accounts.Account{ID: in.ID, Name: in.Name, Email: in.Email, Home: in.Home, Regions: in.Regions})
	if err != nil {
		return err
	}
	s.audit(c, "account.created", "account:"+account.ID, map[string]string{"home": account.Home, "regions": strings.Join(account.Regions, ",")})
	return s.writeJSON(c, http.StatusCreated, account)
}

// changeAccount changes registration data, and disables or enables the account.
func (s *Server) changeAccount(c *call) error {
	var in accounts.Change
	if err := s.decode(c, &in); err != nil {
		return err
	}
	account, err := s.accounts.Update(c.r.Context(), c.vars["account"], in)
	if err != nil {
		return err
	}
	action := "account.changed"
	if in.Disabled != nil {
		action = map[bool]string{true: "account.disabled", false: "account.enabled"}[*in.Disabled]
	}
	s.changes.ring()
	s.audit(c, action, "account:"+account.ID, nil)
	return s.writeJSON(c, http.StatusOK, account)
}

func (s *Server) grantRegion(c *call) error { return s.grant(c, true) }

func (s *Server) revokeRegion(c *call) error { return s.grant(c, false) }

// grant lets an account of Mainland China use this region, or takes it back.
// Another region's rows are another region's to change: regions share nothing.
func (s *Server) grant(c *call, granted bool) error {
	if c.vars["region"] != s.region.ID {
		return s.invalidParameter("region", "this is region "+s.region.ID+": grant a region at its own server")
	}
	before, err := s.accounts.Account(c.r.Context(), c.vars["account"])
	if err != nil {
		return err
	}
	if slices.Contains(before.Regions, s.region.ID) == granted {
		return s.writeJSON(c, http.StatusOK, before)
	}
	account, err := s.accounts.Grant(c.r.Context(), before.ID, s.region.ID, granted)
	if err != nil {
		return err
	}
	s.audit(c, map[bool]string{true: "account.region_granted", false: "account.region_revoked"}[granted], "account:"+account.ID,
		map[string]string{"region": s.region.ID, "home": account.Home})
	return s.writeJSON(c, http.StatusOK, account)
}

// usable reports why an account cannot have a new app in the region.
func usable(a accounts.Account, region string) error {
	switch {
	case a.State == accounts.Deleting || a.State == accounts.Deleted:
		return fmt.Errorf("%w: %s", accounts.ErrDeleted, a.ID)
	case a.Disabled:
		return fmt.Errorf("%w: %s", accounts.ErrDisabled, a.ID)
	}
	return a.Allowed(region)
}
