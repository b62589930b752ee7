package journal

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Retention says how long the data lives that no plan governs. The zero value of
// a field is its default.
type Retention struct {
	// Attachments, Callbacks, Monitoring and Audit count from when the data
	// arrived: 7 days, 3 days, 7 days and 400 days.
	Attachments, Callbacks, Monitoring, Audit time.Duration
	// Accounts and Profiles are how long an account's registration data and a
	// user's profile are kept without being used; 180 days each.
	Accounts, Profiles time.Duration
	// Warning is how long before their end the owners of accounts and profiles
	// are warned; 30 days.
	Warning time.Duration
	// Refresh is the time in which the clock of one account or profile is
	// written at most once, however often it is used; 1 day. What is used may
	// end this much early, counted from the last use, and no earlier.
	Refresh time.Duration
	// Exports is how long an export can be fetched, counted from when it was asked
	// for; 7 days.
	Exports time.Duration
	// Tombstones is how long the keyring tells when the key of an epoch was
	// destroyed; 30 days. That it was, it tells for ever.
	Tombstones time.Duration
}

// DefaultRetention returns the defaults.
func DefaultRetention() Retention { return Retention{}.WithDefaults() }

// WithDefaults returns r with every field set.
func (r Retention) WithDefaults() Retention {
	r.Attachments = cmp.Or(r.Attachments, 7*day)
	r.Callbacks = cmp.Or(r.Callbacks, 3*day)
	r.Monitoring = cmp.Or(r.Monitoring, 7*day)
	r.Audit = cmp.Or(r.Audit, 400*day)
	r.Accounts = cmp.Or(r.Accounts, 180*day)
	r.Profiles = cmp.Or(r.Profiles, 180*day)
	r.Warning = cmp.Or(r.Warning, 30*day)
	r.Refresh = cmp.Or(r.Refresh, day)
	r.Exports = cmp.Or(r.Exports, 7*day)
	r.Tombstones = cmp.Or(r.Tombstones, 30*day)
	return r
}

// Validate reports whether the lifetimes can be used, the defaults filled in.
func (r Retention) Validate() error {
	r = r.WithDefaults()
	shortest := min(r.Attachments, r.Callbacks, r.Monitoring, r.Audit, r.Accounts, r.Profiles, r.Warning, r.Refresh, r.Exports, r.Tombstones)
	switch {
	case shortest < 0:
		return fmt.Errorf("retention: %w: a lifetime is negative", ErrInvalid)
	case r.Warning >= min(r.Accounts, r.Profiles):
		return fmt.Errorf("retention: %w: the warning must be shorter than the lifetimes of accounts and profiles", ErrInvalid)
	case r.Refresh >= r.Warning:
		return fmt.Errorf("retention: %w: the refresh must be shorter than the warning, or what is in use would be warned of", ErrInvalid)
	}
	return nil
}

// A Kind is a kind of data that Coffer keeps.
type Kind string

// The kinds of data. There are no others: a stream that no [Rule] names is not
// opened.
const (
	KindMessages    Kind = "messages"
	KindViews       Kind = "views"
	KindAttachments Kind = "attachments"
	KindCallbacks   Kind = "callbacks"
	KindMonitoring  Kind = "monitoring"
	KindAudit       Kind = "audit"
	KindAccounts    Kind = "accounts"
	KindProfiles    Kind = "profiles"
	KindExports     Kind = "exports"
	KindRegistry    Kind = "registry"
	KindKeyring     Kind = "keyring"
)

// A Since says what a lifetime counts from.
type Since string

// What lifetimes count from.
const (
	// SinceEvent is the event's retention clock, see [Plan.Clock].
	SinceEvent Since = "event"
	// SinceArrival is when the data was stored.
	SinceArrival Since = "arrival"
	// SinceUse is the last use, noticed to [Retention.Refresh].
	SinceUse Since = "use"
)

// An Expiry says what removes data that has expired from where it is stored.
type Expiry string

// What removes expired data.
const (
	// ExpiryMaxAge is the NATS server, by the stream's MaxAge.
	ExpiryMaxAge Expiry = "max_age"
	// ExpirySweep is Coffer's own tick, which costs what it removes.
	ExpirySweep Expiry = "sweep"
	// ExpiryNone: the data stays until it is deleted.
	ExpiryNone Expiry = "none"
)

// A Rule is a row of the retention table: how long a kind of data is kept, and
// where that is enforced.
type Rule struct {
	Kind Kind
	// Plan is the id of the plan that the row is of, for messages and views.
	Plan string
	// Lifetime is how long the data is kept; 0 means until it is deleted.
	Lifetime time.Duration
	Since    Since
	// Warning is how long before its end an event warns; 0 for none.
	Warning time.Duration
	// Read tells that what has expired is refused to readers at once, whatever
	// is still stored.
	Read bool
	// Storage is what removes it.
	Storage Expiry
	// Key tells that the key it is sealed under is destroyed at the latest one
	// epoch after its end, so that no copy elsewhere can be opened either.
	Key bool
	// Streams are the NATS streams that hold it: a name, or what names begin
	// with when it ends in "*". Empty for the views, which are no stream.
	Streams []string
}

// RetentionTable is the one table of every kind of data of a region, and how
// long it is kept: what creates streams, what expires and what destroys keys go
// by it, and [Journal.Check] compares the servers with it.
func RetentionTable(region string, plans []Plan, r Retention) []Rule {
	r = r.WithDefaults()
	var table []Rule
	for _, p := range plans {
		messages := Rule{
			Kind: KindMessages, Plan: p.ID, Lifetime: p.Retention, Since: SinceEvent, Read: true, Storage: ExpiryMaxAge, Key: true,
		}
		for shard := range p.shards() {
			messages.Streams = append(messages.Streams, StreamName(region, p.ID, shard))
		}
		table = append(table, messages, Rule{
			Kind: KindViews, Plan: p.ID, Lifetime: p.Retention, Since: SinceEvent, Read: true, Storage: ExpirySweep, Key: true,
		})
	}
	registry := []string{"KV_" + RegistryBucket(region)}
	return append(table,
		Rule{
			Kind: KindAttachments, Lifetime: r.Attachments, Since: SinceArrival, Read: true, Storage: ExpiryMaxAge, Key: true,
			Streams: []string{"OBJ_" + AttachmentBucket(region)},
		},
		Rule{
			Kind: KindCallbacks, Lifetime: r.Callbacks, Since: SinceArrival, Read: true, Storage: ExpiryMaxAge, Key: true,
			Streams: []string{CallbackStreams(region)},
		},
		// Neither monitoring nor the audit log has personal data or sealed
		// content, so no key ends with them.
		Rule{
			Kind: KindMonitoring, Lifetime: r.Monitoring, Since: SinceArrival, Read: true, Storage: ExpiryMaxAge,
			Streams: []string{MonitoringStream(region)},
		},
		Rule{
			Kind: KindAudit, Lifetime: r.Audit, Since: SinceArrival, Read: true, Storage: ExpiryMaxAge, Streams: []string{AuditStream(region)},
		},
		Rule{
			Kind: KindAccounts, Lifetime: r.Accounts, Since: SinceUse, Warning: r.Warning, Read: true, Storage: ExpirySweep, Key: true,
			Streams: registry,
		},
		Rule{
			Kind: KindProfiles, Lifetime: r.Profiles, Since: SinceUse, Warning: r.Warning, Read: true, Storage: ExpirySweep, Key: true,
			Streams: []string{"KV_" + ProfileBucket(region)},
		},
		// An export is rows that say which events it has; its files are made when
		// they are fetched, from the views, and have nothing that has expired there.
		Rule{Kind: KindExports, Lifetime: r.Exports, Since: SinceArrival, Read: true, Storage: ExpirySweep, Streams: registry},
		Rule{Kind: KindRegistry, Storage: ExpiryNone, Streams: registry},
		Rule{Kind: KindKeyring, Storage: ExpiryNone, Streams: []string{"KV_" + KeyringBucket(region)}},
	)
}

// MaxAge returns the MaxAge that a stream must have by the table, 0 for one
// whose messages the server must not let go. ok is false for a stream that no
// rule names.
func MaxAge(table []Rule, stream string) (age time.Duration, ok bool) {
	for _, rule := range table {
		if !rule.has(stream) {
			continue
		}
		ok = true
		if rule.Storage == ExpiryMaxAge {
			return rule.Lifetime, true
		}
	}
	return 0, ok
}

func (r Rule) has(stream string) bool {
	for _, name := range r.Streams {
		if prefix, open := strings.CutSuffix(name, "*"); name == stream || open && strings.HasPrefix(stream, prefix) {
			return true
		}
	}
	return false
}

// Retention returns the lifetimes that the journal was opened with, none zero.
func (j *Journal) Retention() Retention { return j.cfg.Retention }

// RetentionTable returns the region's retention table.
func (j *Journal) RetentionTable() []Rule {
	return RetentionTable(j.region.ID, j.cfg.Plans, j.cfg.Retention)
}

// AttachmentBucket returns the name of the object store with a region's
// attachments.
func AttachmentBucket(region string) string { return "coffer_" + region + "_attachments" }

// CallbackStream returns the name of a stream of callbacks of a region.
func CallbackStream(region string, shard int) string {
	return "coffer_" + region + "_cb_" + strconv.Itoa(shard)
}

// CallbackStreams returns what the names of all of them are like, as
// [Rule.Streams] has it.
func CallbackStreams(region string) string { return "coffer_" + region + "_cb_*" }

// MonitoringStream returns the name of a region's stream of monitoring data.
func MonitoringStream(region string) string { return "coffer_" + region + "_mon" }

// ProfileBucket returns the name of the KV bucket with the profiles of a
// region's users.
func ProfileBucket(region string) string { return "coffer_" + region + "_profiles" }
