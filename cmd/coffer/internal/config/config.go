package config

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// ErrInvalid means that the configuration cannot be used: correct the setting
// that the error names. Nothing was started.
var ErrInvalid = errors.New("invalid configuration")

// maxFile bounds a configuration file.
const maxFile = 1 << 20

// File is the configuration as written.
type File struct {
	// DataDir holds everything the process stores; made with mode 0700.
	DataDir string `toml:"data_dir"`
	// OperatorTokenFile holds the bearer token of the operator "token", and
	// OperatorsFile names others; mode 0600. One of both is needed.
	OperatorTokenFile string `toml:"operator_token_file"`
	OperatorsFile     string `toml:"operators_file"`
	// ShutdownTimeout is how long open requests may take to end; default 30s.
	ShutdownTimeout Duration `toml:"shutdown_timeout"`

	// Erasures is a file of receipts of erasures that are done again before a
	// region listens, after a restore.
	Erasures string `toml:"erasures"`

	Log    Log    `toml:"log"`
	Limits Limits `toml:"limits"`
	Plans  []Plan `toml:"plan"`
	// Retention is for what no plan governs.
	Retention Retention `toml:"retention"`
	Callbacks Callbacks `toml:"callbacks"`
	Regions   []Region  `toml:"region"`
}

// Log says what is logged, to standard error.
type Log struct {
	Level  string `toml:"level"`  // debug, info (default), warn, error
	Format string `toml:"format"` // json (default) or text
}

// Limits bounds what one listener accepts. Zero values mean the defaults.
type Limits struct {
	Connections   int      `toml:"connections"`    // open at once; default 4096
	RequestBytes  int64    `toml:"request_bytes"`  // body of an append; default 16 MiB
	BatchEvents   int      `toml:"batch_events"`   // events of one append; default 1,000
	HeaderTimeout Duration `toml:"header_timeout"` // default 10s
	BodyTimeout   Duration `toml:"body_timeout"`   // default 60s
	IdleTimeout   Duration `toml:"idle_timeout"`   // between requests; default 2m
	WriteTimeout  Duration `toml:"write_timeout"`  // for each part of a stream; default 30s
	Streams       int      `toml:"streams"`        // replays and tails at a time; default 4,096
	AppRequests   int      `toml:"app_requests"`   // requests of one app a second; default 5,000
	AppBurst      int      `toml:"app_burst"`      // requests of one app at once; default twice app_requests
	AppStreams    int      `toml:"app_streams"`    // streams of one app at a time; default 1,024
	UserRequests  int      `toml:"user_requests"`  // requests of one user a second; default 50
	UserBurst     int      `toml:"user_burst"`     // requests of one user at once; default twice user_requests
	UserStreams   int      `toml:"user_streams"`   // streams of one user at a time; default 16

	AttachmentBytes int64 `toml:"attachment_bytes"` // of one attachment; default 10 MiB
}

// Plan is a row of the plan table; without any, the product's four plans apply.
type Plan struct {
	ID        string   `toml:"id"`
	Retention Duration `toml:"retention"`
	Epoch     Duration `toml:"epoch"`
	Shards    int      `toml:"shards"`
}

// Region is a region that this process serves or, without Listen, one that
// it only knows the address of.
type Region struct {
	ID string `toml:"id"`
	// Place, Cloud and Number are known for sg, cn, eu and us.
	Place  string `toml:"place"`
	Cloud  string `toml:"cloud"`
	Number int    `toml:"number"`

	// Listen is HOST:PORT; empty for a region served elsewhere.
	Listen string `toml:"listen"`
	// URL is where callers reach the region; callers of a wrong region are
	// told it.
	URL string `toml:"url"`
	// KMS names the key provider, for example local:/var/lib/coffer/eu.key.
	KMS string `toml:"kms"`
	// KMSOthers name further key providers that wrap keys of the region's apps,
	// beside those that migrations have brought in.
	KMSOthers []string `toml:"kms_others"`
	// Plaintext asks for HTTP; refused but on a loopback address.
	Plaintext bool `toml:"plaintext"`

	TLS  TLS  `toml:"tls"`
	NATS NATS `toml:"nats"`
	Keys Keys `toml:"keys"`

	Compat Compat `toml:"compat"`
}

// Keys says how long an unwrapped key is used without asking the provider.
type Keys struct {
	// Revalidate is when the provider is asked again, give or take a fifth, so
	// that a revocation is noticed; default 15m.
	Revalidate Duration `toml:"revalidate"`
	// Outage is the longest outage of the provider that is bridged, and the
	// longest lag of a revocation during one; default 4h, at most 24h.
	Outage Duration `toml:"outage"`
}

// TLS names the listener's certificate chain and key (PEM).
type TLS struct {
	CertFile string `toml:"cert_file"`
	KeyFile  string `toml:"key_file"`
}

// NATS is a region's stream store: without URL a server inside the process
// that stores in the data directory.
type NATS struct {
	URL             string `toml:"url"`
	CredentialsFile string `toml:"credentials_file"` // user JWT and seed, mode 0600
	UserFile        string `toml:"user_file"`        // USER:PASSWORD on one line, mode 0600
	CAFile          string `toml:"ca_file"`
	// Replicas is how many servers keep each stream: 1 (default), 3 or 5.
	Replicas int `toml:"replicas"`
}

// Config is a configuration that has been checked.
type Config struct {
	File
	// PlanTable is never empty.
	PlanTable []journal.Plan
	// Operators recognises the operators' tokens.
	Operators auth.Operators
}

// Load reads the file at path, if one is given, then the settings of the
// environment ("NAME=value" each, as os.Environ gives them), and checks the
// whole.
func Load(path string, environ []string) (Config, error) {
	var f File
	if path != "" {
		if err := f.read(path); err != nil {
			return Config{}, err
		}
	}
	if err := f.overlay(environ); err != nil {
		return Config{}, err
	}
	return f.check()
}

func (f *File) read(path string) error {
	r, err := os.Open(path) //nolint:gosec // the path is the operator's own setting
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	defer func() { _ = r.Close() }()
	text, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return fmt.Errorf("%w: reading %s: %w", ErrInvalid, path, err)
	}
	if len(text) > maxFile {
		return fmt.Errorf("%w: %s is larger than %d bytes", ErrInvalid, path, maxFile)
	}
	meta, err := toml.Decode(string(text), f)
	if err != nil {
		// A ParseError's long form quotes the file; its message does not.
		if parse, ok := errors.AsType[toml.ParseError](err); ok {
			return fmt.Errorf("%w: %s line %d: %s", ErrInvalid, path, parse.Position.Line, parse.Message)
		}
		return fmt.Errorf("%w: %s: %w", ErrInvalid, path, err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		names := make([]string, len(unknown))
		for i, key := range unknown {
			names[i] = key.String()
		}
		return fmt.Errorf("%w: %s has unknown keys: %s", ErrInvalid, path, strings.Join(names, ", "))
	}
	return nil
}

// check fills in what has a default and refuses what cannot be used.
func (f File) check() (Config, error) {
	c := Config{File: f}
	if c.DataDir == "" {
		return Config{}, fmt.Errorf("%w: data_dir is missing", ErrInvalid)
	}
	var err error
	if c.Operators, err = f.operators(); err != nil {
		return Config{}, err
	}
	if c.ShutdownTimeout == 0 {
		c.ShutdownTimeout = Duration(30 * time.Second)
	}
	if _, err := c.Log.level(); err != nil {
		return Config{}, err
	}
	if c.Log.Format != "" && c.Log.Format != "json" && c.Log.Format != "text" {
		return Config{}, fmt.Errorf("%w: log.format is json or text", ErrInvalid)
	}
	if err := c.Limits.check(); err != nil {
		return Config{}, err
	}
	if c.PlanTable, err = planTable(c.Plans); err != nil {
		return Config{}, err
	}
	if err := c.Retention.check(); err != nil {
		return Config{}, err
	}
	if err := c.Callbacks.check(); err != nil {
		return Config{}, err
	}
	if err := c.checkRegions(); err != nil {
		return Config{}, err
	}
	return c, nil
}

func (l Limits) check() error {
	for name, negative := range map[string]bool{
		"connections": l.Connections < 0, "request_bytes": l.RequestBytes < 0, "batch_events": l.BatchEvents < 0,
		"header_timeout": l.HeaderTimeout < 0, "body_timeout": l.BodyTimeout < 0,
		"streams": l.Streams < 0, "app_requests": l.AppRequests < 0, "app_burst": l.AppBurst < 0, "app_streams": l.AppStreams < 0,
		"user_requests": l.UserRequests < 0, "user_burst": l.UserBurst < 0, "user_streams": l.UserStreams < 0,
		"attachment_bytes": l.AttachmentBytes < 0,
		"idle_timeout":     l.IdleTimeout < 0, "write_timeout": l.WriteTimeout < 0,
	} {
		if negative {
			return fmt.Errorf("%w: limits.%s is negative", ErrInvalid, name)
		}
	}
	return nil
}

func (l Log) level() (slog.Level, error) {
	var level slog.Level
	if l.Level == "" {
		return slog.LevelInfo, nil
	}
	if err := level.UnmarshalText([]byte(l.Level)); err != nil {
		return 0, fmt.Errorf("%w: log.level is debug, info, warn or error", ErrInvalid)
	}
	return level, nil
}

// Logger makes the logger that the settings describe.
func (l Log) Logger(w io.Writer) *slog.Logger {
	level, err := l.level()
	if err != nil {
		level = slog.LevelInfo // Load has refused it already
	}
	options := &slog.HandlerOptions{Level: level}
	if l.Format == "text" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

func planTable(rows []Plan) ([]journal.Plan, error) {
	if len(rows) == 0 {
		return journal.DefaultPlans(), nil
	}
	var table []journal.Plan
	for _, row := range rows {
		plan := journal.Plan{ID: row.ID, Retention: time.Duration(row.Retention), Epoch: time.Duration(row.Epoch), Shards: row.Shards}
		if err := plan.Validate(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		if slices.ContainsFunc(table, func(p journal.Plan) bool { return p.ID == plan.ID }) {
			return nil, fmt.Errorf("%w: plan %s appears twice", ErrInvalid, plan.ID)
		}
		table = append(table, plan)
	}
	return table, nil
}

func (c *Config) checkRegions() error {
	served := 0
	for i := range c.Regions {
		r := &c.Regions[i]
		r.fillIn()
		if err := r.check(); err != nil {
			return err
		}
		for _, other := range c.Regions[:i] {
			if other.ID == r.ID || other.Number == r.Number {
				return fmt.Errorf("%w: region %s appears twice, or shares its number with %s", ErrInvalid, r.ID, other.ID)
			}
		}
		if r.Listen != "" {
			served++
		}
	}
	if served == 0 {
		return fmt.Errorf("%w: no region has a listen address", ErrInvalid)
	}
	return nil
}

func (r *Region) fillIn() {
	for _, known := range journal.DefaultRegions() {
		if known.ID != r.ID {
			continue
		}
		if r.Place == "" {
			r.Place = known.Place
		}
		if r.Cloud == "" {
			r.Cloud = known.Cloud
		}
		if r.Number == 0 {
			r.Number = int(known.Number)
		}
	}
}

// Journal returns the region in the journal's terms.
func (r Region) Journal() journal.Region {
	return journal.Region{ID: r.ID, Place: r.Place, Cloud: r.Cloud, Number: byte(r.Number)}
}

func (r Region) check() error {
	if r.Number < 0 || r.Number > 255 {
		return fmt.Errorf("%w: region %s: number is 1 to 255", ErrInvalid, r.ID)
	}
	if err := r.Journal().Validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if r.URL != "" {
		if u, err := url.Parse(r.URL); err != nil || u.Host == "" || u.User != nil || (u.Scheme != "https" && (u.Scheme != "http" || !r.Plaintext)) {
			return fmt.Errorf("%w: region %s: url must be https://HOST[:PORT]", ErrInvalid, r.ID)
		}
	}
	if r.Listen == "" {
		if r.URL == "" {
			return fmt.Errorf("%w: region %s has neither listen nor url", ErrInvalid, r.ID)
		}
		return nil
	}
	host, port, err := net.SplitHostPort(r.Listen)
	if err != nil {
		return fmt.Errorf("%w: region %s: listen must be HOST:PORT", ErrInvalid, r.ID)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%w: region %s: listen has no port number", ErrInvalid, r.ID)
	}
	if r.KMS == "" {
		return fmt.Errorf("%w: region %s: kms is missing", ErrInvalid, r.ID)
	}
	if err := r.checkTLS(host); err != nil {
		return err
	}
	if err := r.Keys.check(r.ID); err != nil {
		return err
	}
	if err := r.checkCompat(); err != nil {
		return err
	}
	return r.NATS.check(r.ID)
}

func (k Keys) check(region string) error {
	revalidate, outage := time.Duration(k.Revalidate), time.Duration(k.Outage)
	if revalidate < 0 || outage < 0 || outage > kms.MaxHard || cmp.Or(revalidate, kms.DefaultSoft) > cmp.Or(outage, kms.DefaultHard) {
		return fmt.Errorf("%w: region %s: keys.revalidate (15m) is at most keys.outage (4h), and that at most %s", ErrInvalid, region, kms.MaxHard)
	}
	return nil
}

func (r Region) checkTLS(host string) error {
	if r.Plaintext {
		if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return fmt.Errorf("%w: region %s: plaintext is for loopback addresses only", ErrInvalid, r.ID)
		}
		return nil
	}
	if r.TLS.CertFile == "" || r.TLS.KeyFile == "" {
		return fmt.Errorf("%w: region %s: tls.cert_file and tls.key_file are missing", ErrInvalid, r.ID)
	}
	if err := auth.CheckSecretFile(r.TLS.KeyFile); err != nil {
		return fmt.Errorf("%w: region %s: tls.key_file: %w", ErrInvalid, r.ID, err)
	}
	return nil
}

func (n NATS) check(region string) error {
	if n.URL == "" {
		if n != (NATS{}) {
			return fmt.Errorf("%w: region %s: nats has settings but no url", ErrInvalid, region)
		}
		return nil
	}
	if !slices.Contains([]int{0, 1, 3, 5}, n.Replicas) {
		return fmt.Errorf("%w: region %s: nats.replicas is 1, 3 or 5: of an even number of servers no more may fail", ErrInvalid, region)
	}
	for server := range strings.SplitSeq(n.URL, ",") {
		u, err := url.Parse(server)
		if err != nil || u.Host == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) {
			return fmt.Errorf("%w: region %s: nats.url must be tls://HOST:PORT, several separated by commas", ErrInvalid, region)
		}
		if u.User != nil {
			return fmt.Errorf("%w: region %s: nats.url holds a secret; use credentials_file or user_file", ErrInvalid, region)
		}
		if ip := net.ParseIP(u.Hostname()); u.Scheme != "tls" && u.Scheme != "wss" && u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return fmt.Errorf("%w: region %s: nats.url without TLS is for loopback addresses only", ErrInvalid, region)
		}
	}
	for name, file := range map[string]string{"credentials_file": n.CredentialsFile, "user_file": n.UserFile} {
		if file == "" {
			continue
		}
		if err := auth.CheckSecretFile(file); err != nil {
			return fmt.Errorf("%w: region %s: nats.%s: %w", ErrInvalid, region, name, err)
		}
	}
	if n.CredentialsFile != "" && n.UserFile != "" {
		return fmt.Errorf("%w: region %s: nats has both credentials_file and user_file", ErrInvalid, region)
	}
	return nil
}

// Dir returns the folder of a region's own data.
func (c Config) Dir(region string) string { return filepath.Join(c.DataDir, region) }

// Duration is a time span as text: "90d", "36h", "1h30m". A day is 24 hours.
type Duration time.Duration

// UnmarshalText parses the text form.
func (d *Duration) UnmarshalText(text []byte) error {
	s := string(text)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return fmt.Errorf("%q is not a whole number of days", s)
		}
		*d = Duration(time.Duration(n) * 24 * time.Hour)
		return nil
	}
	span, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%q is not a time span such as 90d, 36h or 30s", s)
	}
	*d = Duration(span)
	return nil
}
