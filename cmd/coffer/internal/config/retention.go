package config

import (
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// Retention is how long the data is kept that no plan governs. What is not set
// has the default of journal.Retention.
type Retention struct {
	Attachments Duration `toml:"attachments"` // default 7d
	Callbacks   Duration `toml:"callbacks"`   // default 3d
	Monitoring  Duration `toml:"monitoring"`  // default 7d
	Audit       Duration `toml:"audit"`       // default 400d
	Accounts    Duration `toml:"accounts"`    // unused; default 180d
	Profiles    Duration `toml:"profiles"`    // unused; default 180d
	Warning     Duration `toml:"warning"`     // before the end of the two; default 30d
	Refresh     Duration `toml:"refresh"`     // one write of their clocks at most; default 1d
	Exports     Duration `toml:"exports"`     // default 7d
}

// Journal returns the lifetimes in the journal's terms, the defaults filled in.
func (r Retention) Journal() journal.Retention {
	return journal.Retention{
		Attachments: time.Duration(r.Attachments), Callbacks: time.Duration(r.Callbacks),
		Monitoring: time.Duration(r.Monitoring), Audit: time.Duration(r.Audit),
		Accounts: time.Duration(r.Accounts), Profiles: time.Duration(r.Profiles),
		Exports: time.Duration(r.Exports),
		Warning: time.Duration(r.Warning), Refresh: time.Duration(r.Refresh),
	}.WithDefaults()
}

func (r Retention) check() error {
	if err := r.Journal().Validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}
