// Package accounts keeps the accounts of a region: who owns apps.
//
// An account is a row of the region's registry. Regions share nothing, so an
// account that has apps in two regions has a row in each. The row holds an
// opaque id and what is needed to decide; the registration data, which may be a
// person's, is sealed under keys of the registry's own and a key of the account,
// and ends when the account is deleted or has not been used for a time (package
// shelf).
//
// An account is used when an app of it is, or when an operator changes it.
// Looking at it is no use.
package accounts

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

var (
	// ErrInvalid means that an account's id, name, e-mail address or home breaks
	// a rule, which the text names. Correct it.
	ErrInvalid = errors.New("invalid account")
	// ErrNotFound means that the region has no account with the id. Create it
	// in this region first.
	ErrNotFound = errors.New("account not found")
	// ErrExists means that the region has, or has had, an account with the id.
	// Read it, or take another id: those of deleted accounts are not used again.
	ErrExists = errors.New("account exists")
	// ErrDeleted means that the account is deleted or being deleted. Nothing can
	// be done with it.
	ErrDeleted = errors.New("account deleted")
	// ErrDisabled means that an operator has disabled the account. Its apps
	// answer nobody until it is enabled again.
	ErrDisabled = errors.New("account disabled")
	// ErrRegionForbidden means that an account of Mainland China asked for
	// another region than cn without a grant. Use cn, or have an operator grant
	// the region.
	ErrRegionForbidden = errors.New("region forbidden for the account")
)

const (
	maxName  = 200
	maxEmail = 254
	maxID    = 64

	// China is the home of accounts that may use the region of that id only.
	China = "cn"
)

// State is how far an account's life is.
type State string

// The states of an account.
const (
	Active State = "active"
	// Expired: the registration data has ended unused. The apps are as they
	// were, and registering again makes the account active.
	Expired State = "expired"
	// Deleting and Deleted: nothing can be done with it any more.
	Deleting State = "deleting"
	Deleted  State = "deleted"
)

// Account owns apps.
type Account struct {
	ID string `json:"id"`
	// Name and Email are the registration data; both may be empty.
	Name  string `json:"name"`
	Email string `json:"email,omitempty"`

	Home     string    `json:"home,omitempty"`    // "cn" for an account of Mainland China
	Regions  []string  `json:"regions,omitempty"` // granted beyond what Home allows
	Disabled bool      `json:"disabled,omitempty"`
	State    State     `json:"state"`
	Created  time.Time `json:"created"`
	// Used is the last use that was written down; after Ends without another
	// the registration data is gone.
	Used time.Time `json:"used,omitzero"`
	Ends time.Time `json:"ends,omitzero"`
	// Expiring is set from the warning before that end.
	Expiring bool `json:"expiring,omitempty"`
}

// Allowed returns ErrRegionForbidden when the account may not have apps in the
// region.
func (a Account) Allowed(region string) error {
	if a.Home != China || region == China || slices.Contains(a.Regions, region) {
		return nil
	}
	return ErrRegionForbidden
}

func check(a Account) error {
	if err := checkID(a.ID); err != nil {
		return err
	}
	if err := checkText("a name", a.Name, maxName); err != nil {
		return err
	}
	if err := checkText("an e-mail address", a.Email, maxEmail); err != nil {
		return err
	}
	if at := strings.LastIndexByte(a.Email, '@'); a.Email != "" && (at < 1 || at == len(a.Email)-1 || strings.ContainsAny(a.Email, " ,;<>")) {
		return fmt.Errorf("%w: an e-mail address is NAME@DOMAIN", ErrInvalid)
	}
	if a.Home != "" && a.Home != China {
		return fmt.Errorf("%w: home is cn, for an account of Mainland China, or empty", ErrInvalid)
	}
	for _, r := range a.Regions {
		if r == "" || len(r) > 8 {
			return fmt.Errorf("%w: regions holds ids of regions", ErrInvalid)
		}
	}
	return nil
}

func checkText(what, text string, limit int) error {
	if len(text) > limit || !utf8.ValidString(text) {
		return fmt.Errorf("%w: %s is UTF-8 of at most %d bytes", ErrInvalid, what, limit)
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
		return fmt.Errorf("%w: %s has no control characters", ErrInvalid, what)
	}
	return nil
}

func checkID(id string) error {
	ok := id != "" && len(id) <= maxID
	for i := 0; ok && i < len(id); i++ {
		c := id[i]
		ok = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_'
	}
	if !ok {
		return fmt.Errorf("%w: an id is 1 to %d lower-case letters, digits, - and _", ErrInvalid, maxID)
	}
	return nil
}
