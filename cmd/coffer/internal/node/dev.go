package node

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/sync/errgroup"

	"github.com/cofferdb/coffer/cmd/coffer/internal/accounts"
	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/journal"
)

const (
	devAccount = "dev"
	devPlan    = "enterprise"
	devRegion  = "eu" // the one that dev.env is about
	devTimeout = 60 * time.Second

	// devRenew is how often the token in the files is replaced; it is good for
	// a day.
	devRenew = 6 * time.Hour
)

// DevOptions says how a development set-up runs.
type DevOptions struct {
	// Dir is the data directory; "coffer-data" when empty.
	Dir string
	// PortBase is the loopback port of the first region, the others follow in
	// the order sg, cn, eu, us. 0 means free ports.
	PortBase int
	// Compat opens a second listener for each region, in the form of Agora Chat's
	// REST interface, on free loopback ports.
	Compat bool
	// Log receives what the process logs; nil discards it.
	Log *slog.Logger
	// Limits bounds requests; see config.Limits.
	Limits config.Limits
	// Callbacks says where webhook requests may go. Certificates of the set-up's
	// own authority are trusted when it names no others.
	Callbacks config.Callbacks
	// Now is the clock of events, retention, certificates and tokens; time.Now
	// when nil.
	Now func() time.Time
	// Day is how long a day lasts, 1 s to 24 hours; 0 means 24 hours. Every
	// lifetime is scaled by it, so that what ends after months can be watched
	// ending. A data directory keeps the day that it was made with.
	Day time.Duration

	shutdown time.Duration // of tests
}

// devApp is the development app of a region. Its certificate and token are
// secrets.
type devApp struct {
	id          journal.AppID
	certificate journal.Certificate
}

// Dev runs the four regions on loopback addresses for development: certificates
// of an own authority, keys in local files, one account with an app in each
// region on the enterprise plan, and an operator token. What was made is kept in
// the directory and used again. It returns when all regions are ready and the
// files dev.env and dev.json are written.
func Dev(ctx context.Context, o DevOptions) (*Process, error) {
	if o.Dir == "" {
		o.Dir = "coffer-data"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("the data directory: %w", err)
	}
	if o.PortBase < 0 || o.PortBase > 65535-len(journal.DefaultRegions()) {
		return nil, fmt.Errorf("%w: the port base is 0 to %d", config.ErrInvalid, 65535-len(journal.DefaultRegions()))
	}
	ctx, cancel := context.WithTimeout(ctx, devTimeout)
	defer cancel()
	if o.Day != 0 && (o.Day < MinDay || o.Day > MaxDay) {
		return nil, fmt.Errorf("%w: a day lasts %s to %s", config.ErrInvalid, MinDay, MaxDay)
	}
	if o.Day == wholeDay {
		o.Day = 0
	}
	lock, err := prepare(dir)
	if err != nil {
		return nil, err
	}
	if err := checkDay(dir, o.Day); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	cfg, ca, err := devConfig(dir, o)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	p, err := start(ctx, cfg, o.Log, lock, clock{now: o.Now, day: o.Day})
	if err != nil {
		return nil, err
	}
	p.CAFile = ca.path
	p.EnvFile, p.File = filepath.Join(dir, "dev.env"), filepath.Join(dir, "dev.json")
	if err := p.setUpDev(ctx, o); err != nil {
		return nil, errors.Join(err, p.Close(ctx))
	}
	return p, nil
}

// devConfig makes what a configuration file would name, and the configuration.
func devConfig(dir string, o DevOptions) (config.Config, *authority, error) {
	var cfg config.Config
	if err := removeDevFiles(dir); err != nil {
		return cfg, nil, err
	}
	ca, err := openAuthority(dir, o.Now())
	if err != nil {
		return cfg, nil, err
	}
	tokenFile := filepath.Join(dir, "operator.token")
	if !exists(tokenFile) {
		if err := writeSecret(tokenFile, []byte(auth.NewOperatorToken()+"\n")); err != nil {
			return cfg, nil, err
		}
	}
	operator, err := auth.LoadOperator(tokenFile)
	if err != nil {
		return cfg, nil, err
	}
	if err := cfg.Operators.Add(config.OperatorOfToken, operator); err != nil {
		return cfg, nil, err
	}
	cfg.DataDir, cfg.OperatorTokenFile = dir, tokenFile
	cfg.PlanTable, cfg.Limits = scaledPlans(o.Day), o.Limits
	cfg.Callbacks = o.Callbacks
	if cfg.Callbacks.CAFile == "" {
		cfg.Callbacks.CAFile = ca.path
	}
	cfg.ShutdownTimeout = config.Duration(orDefault(o.shutdown, 10*time.Second))
	if err := ca.issue(filepath.Join(dir, ListenCertificate), filepath.Join(dir, ListenKey), "receiver", o.Now()); err != nil {
		return cfg, nil, err
	}
	for i, r := range journal.DefaultRegions() {
		own := regionDir(dir, r.ID)
		if err := secureDir(own); err != nil {
			return cfg, nil, err
		}
		certFile, keyFile := filepath.Join(own, "tls.pem"), filepath.Join(own, "tls.key")
		if err := ca.issue(certFile, keyFile, "region "+r.ID, o.Now()); err != nil {
			return cfg, nil, err
		}
		port := 0
		if o.PortBase > 0 {
			port = o.PortBase + i
		}
		cfg.Regions = append(cfg.Regions, config.Region{
			ID: r.ID, Place: r.Place, Cloud: r.Cloud, Number: int(r.Number),
			Listen: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)),
			KMS:    "local:" + filepath.Join(own, "kek.json"),
			TLS:    config.TLS{CertFile: certFile, KeyFile: keyFile},
		})
	}
	if o.Compat {
		for i := range cfg.Regions {
			cfg.Regions[i].Compat.Listen = "127.0.0.1:0"
		}
	}
	return cfg, ca, nil
}

// removeDevFiles removes the files whose presence says that the regions are
// ready: at a start those of a process that was killed, at the end its own.
func removeDevFiles(dir string) error {
	for _, name := range []string{"dev.env", "dev.json"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("removing an old file: %w", err)
		}
	}
	return nil
}

// setUpDev makes or finds the account and the apps, and writes the files.
func (p *Process) setUpDev(ctx context.Context, o DevOptions) error {
	group, groupCtx := errgroup.WithContext(ctx)
	for i, r := range p.regions {
		group.Go(func() error {
			app, err := r.devApp(groupCtx)
			if err != nil {
				return fmt.Errorf("region %s: the development app: %w", r.config.ID, err)
			}
			p.Regions[i].dev, p.Regions[i].App = app, app.id.String()
			if r.compat != nil {
				p.Regions[i].Compat = r.compat.url + "/" + devAccount + "/" + app.id.String()
			}
			if err := r.awaitReady(groupCtx); err != nil {
				return fmt.Errorf("region %s: %w", r.config.ID, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if err := p.writeDevFiles(o.Now()); err != nil {
		return err
	}
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	earlier := p.stop
	p.stop = func() { stop(); earlier() }
	p.background.Go(func() {
		tick := time.NewTicker(devRenew)
		defer tick.Stop()
		for {
			select {
			case <-background.Done():
				return
			case <-tick.C:
				if err := p.writeDevFiles(o.Now()); err != nil {
					p.log.Error("the development files were not renewed", "err", err)
				}
			}
		}
	})
	return nil
}

func (r *region) devApp(ctx context.Context) (*devApp, error) {
	for app, err := range r.journal.Apps(ctx) {
		if err != nil {
			return nil, err
		}
		if app.Account == devAccount && app.Plan == devPlan && !app.Disabled {
			return &devApp{id: app.ID, certificate: app.Certificates[0]}, nil
		}
	}
	_, err := r.accounts.Create(ctx, accounts.Account{ID: devAccount, Name: "Development"})
	if err != nil && !errors.Is(err, accounts.ErrExists) {
		return nil, err
	}
	app, err := r.journal.CreateApp(ctx, journal.AppSpec{Name: "Development", Account: devAccount, Plan: devPlan})
	if err != nil {
		return nil, err
	}
	return &devApp{id: app.ID, certificate: app.Certificates[0]}, nil
}

// devFile is dev.json, and one region of it is dev.env.
type devFile struct {
	Regions map[string]devEntry `json:"regions"`
}

type devEntry struct {
	URL           string `json:"COFFER_URL"`
	CA            string `json:"COFFER_CA"`
	App           string `json:"COFFER_APP"`
	Certificate   string `json:"COFFER_APP_CERTIFICATE"`
	Token         string `json:"COFFER_TOKEN"`
	OperatorToken string `json:"COFFER_OPERATOR_TOKEN"`
}

func (p *Process) writeDevFiles(now time.Time) error {
	operator, err := auth.ReadSecret(p.cfg.OperatorTokenFile)
	if err != nil {
		return err
	}
	file := devFile{Regions: make(map[string]devEntry)}
	for _, r := range p.Regions {
		var salt [4]byte
		_, _ = rand.Read(salt[:]) // never fails, says crypto/rand
		token, err := auth.Build(auth.Spec{
			AppID: r.App, Certificate: r.dev.certificate.Reveal(), Issued: now, Lifetime: auth.MaxLifetime,
			Salt: binary.BigEndian.Uint32(salt[:]),
		})
		if err != nil {
			return fmt.Errorf("making a development token: %w", err)
		}
		file.Regions[r.ID] = devEntry{
			URL: r.URL, CA: p.CAFile, App: r.App, Certificate: r.dev.certificate.Reveal(), Token: token, OperatorToken: operator,
		}
	}
	text, err := json.Marshal(file, json.Deterministic(true), jsontext.WithIndent("  "))
	if err != nil {
		return fmt.Errorf("encoding dev.json: %w", err)
	}
	if err := writeSecret(p.File, append(text, '\n')); err != nil {
		return err
	}
	e := file.Regions[devRegion]
	var lines strings.Builder
	for _, line := range [][2]string{
		{"COFFER_URL", e.URL},
		{"COFFER_CA", e.CA},
		{"COFFER_APP", e.App},
		{"COFFER_APP_CERTIFICATE", e.Certificate},
		{"COFFER_TOKEN", e.Token},
		{"COFFER_OPERATOR_TOKEN", e.OperatorToken},
	} {
		lines.WriteString(line[0] + "=" + shellQuote(line[1]) + "\n")
	}
	return writeSecret(p.EnvFile, []byte(lines.String()))
}

// shellQuote quotes a value for a POSIX shell where it needs to be.
func shellQuote(s string) string {
	plain := s != "" && !strings.ContainsFunc(s, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("_-./:=+@%,", c)
	})
	if plain {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// CurlLine is a command for a shell that appends an event to the development
// app of region eu. It takes the token from dev.env, so that none is on the
// screen or in a shell's history.
func (p *Process) CurlLine() string {
	return `( set -a; . ` + shellQuote(p.EnvFile) + `; curl -sS --cacert "$COFFER_CA" ` +
		`-H "Authorization: Bearer $COFFER_TOKEN" -H 'Content-Type: application/json' "$COFFER_URL/v1/apps/$COFFER_APP/events" ` +
		`-d '{"type":"message.sent","sender":"ann","recipient":"ben","data":{"bodies":[{"type":"txt","msg":"hello"}]}}' )`
}
