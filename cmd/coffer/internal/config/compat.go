package config

import (
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// Compat is a second listener of a region that answers in the form of Agora
// Chat's REST interface; without Listen there is none. It has the region's
// certificate and limits.
type Compat struct {
	Listen string `toml:"listen"` // HOST:PORT
	// URL is where its callers reach it: links to files begin with it. By default
	// the host that a request names.
	URL string `toml:"url"`
	// RecallWindow is how long after a message it can be recalled without force;
	// default 2m, at most 7d.
	RecallWindow Duration    `toml:"recall_window"`
	Apps         []CompatApp `toml:"app"`
}

// CompatApp names an app as it stands in the paths of scripts.
type CompatApp struct {
	Name string `toml:"name"` // ORG/APP
	ID   string `toml:"id"`   // 32 hex digits
}

// Table returns the names and their apps.
func (c Compat) Table() map[string]journal.AppID {
	table := make(map[string]journal.AppID, len(c.Apps))
	for _, a := range c.Apps {
		if id, err := journal.ParseAppID(a.ID); err == nil { // Load has refused any other
			table[a.Name] = id
		}
	}
	return table
}

// maxRecallWindow is the other service's.
const maxRecallWindow = 7 * 24 * time.Hour

func (r Region) checkCompat() error {
	c := r.Compat
	if c.Listen == "" {
		if c.URL != "" || c.RecallWindow != 0 || len(c.Apps) > 0 {
			return fmt.Errorf("%w: region %s: compat has settings but no listen", ErrInvalid, r.ID)
		}
		return nil
	}
	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return fmt.Errorf("%w: region %s: compat.listen must be HOST:PORT", ErrInvalid, r.ID)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%w: region %s: compat.listen has no port number", ErrInvalid, r.ID)
	}
	if ip := net.ParseIP(host); r.Plaintext && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("%w: region %s: plaintext is for loopback addresses only", ErrInvalid, r.ID)
	}
	if c.URL != "" {
		if u, err := url.Parse(c.URL); err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || (u.Scheme != "https" && (u.Scheme != "http" || !r.Plaintext)) {
			return fmt.Errorf("%w: region %s: compat.url must be https://HOST[:PORT]", ErrInvalid, r.ID)
		}
	}
	if c.RecallWindow < 0 || time.Duration(c.RecallWindow) > maxRecallWindow {
		return fmt.Errorf("%w: region %s: compat.recall_window is at most 7d", ErrInvalid, r.ID)
	}
	seen := make(map[string]bool)
	for _, a := range c.Apps {
		org, app, ok := strings.Cut(a.Name, "/")
		if !ok || org == "" || app == "" || strings.Contains(app, "/") || seen[a.Name] {
			return fmt.Errorf("%w: region %s: the name of a compat.app is ORG/APP, each once", ErrInvalid, r.ID)
		}
		seen[a.Name] = true
		if id, err := journal.ParseAppID(a.ID); err != nil || id.Region() != byte(r.Number) {
			return fmt.Errorf("%w: region %s: compat.app %s: id is 32 hex digits of an app of the region", ErrInvalid, r.ID, a.Name)
		}
	}
	return nil
}
