package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
)

// site is a folder with the files that a configuration names.
type site struct {
	t   *testing.T
	dir string
}

func newSite(t *testing.T) site {
	s := site{t: t, dir: t.TempDir()}
	s.write("operator.token", auth.NewOperatorToken(), 0o600)
	s.write("ann.token", auth.NewOperatorToken()+"\n", 0o600)
	s.write("operators", "# by name\n\nann: file:ann.token\n", 0o600)
	s.write("tls.pem", "certificate", 0o644)
	s.write("tls.key", "key", 0o600)
	s.write("nats.creds", "creds", 0o600)
	return s
}

func (s site) write(name, content string, mode os.FileMode) {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		s.t.Fatal(err)
	}
}

func (s site) load(text string, environ ...string) (Config, error) {
	s.write("coffer.toml", strings.ReplaceAll(text, "DIR", s.dir), 0o644)
	for i := range environ {
		environ[i] = strings.ReplaceAll(environ[i], "DIR", s.dir)
	}
	return Load(filepath.Join(s.dir, "coffer.toml"), environ)
}

const whole = `
data_dir = "DIR/data"
operator_token_file = "DIR/operator.token"
operators_file = "DIR/operators"
shutdown_timeout = "5s"

[log]
level = "warn"
format = "text"

[retention]
audit = "30d"

[limits]
batch_events = 500
body_timeout = "20s"

[[plan]]
id = "short"
retention = "3d"
epoch = "6h"

[[region]]
id = "eu"
listen = "0.0.0.0:7443"
url = "https://eu.example.com:7443"
kms = "local:DIR/data/eu.key"
[region.tls]
cert_file = "DIR/tls.pem"
key_file = "DIR/tls.key"
[region.nats]
url = "tls://a.example.com:4222,tls://b.example.com:4222"
credentials_file = "DIR/nats.creds"

[[region]]
id = "us"
url = "https://us.example.com"
`

func TestLoad(t *testing.T) {
	s := newSite(t)
	c, err := s.load(whole, "COFFER_SERVER_REGION_EU_LISTEN=127.0.0.1:9000", "COFFER_SERVER_LOG_LEVEL=debug",
		"COFFER_URL=https://ignored.example.com", "HOME=/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	eu := c.Regions[0]
	switch {
	case eu.Listen != "127.0.0.1:9000", c.Log.Level != "debug":
		t.Error("the environment does not win")
	case eu.Number != 3 || eu.Place != "Frankfurt" || eu.Cloud != "eu-central-1":
		t.Errorf("defaults of eu: %+v", eu)
	case len(c.PlanTable) != 1 || c.PlanTable[0].Retention != 72*time.Hour:
		t.Errorf("plans: %+v", c.PlanTable)
	case c.Retention.Journal().Audit != 30*24*time.Hour || c.Retention.Journal().Profiles != 180*24*time.Hour:
		t.Errorf("retention: %+v", c.Retention.Journal())
	case !operators(c, s.dir):
		t.Error("an operator is not known")
	case c.ShutdownTimeout != Duration(5*time.Second):
		t.Errorf("shutdown_timeout %v", c.ShutdownTimeout)
	}
}

func TestEnvironmentAlone(t *testing.T) {
	s := newSite(t)
	var environ []string
	for name, value := range map[string]string{
		"DATA_DIR": "DIR/data", "OPERATOR_TOKEN_FILE": "DIR/operator.token",
		"REGION_SG_LISTEN": "127.0.0.1:7441", "REGION_SG_KMS": "local:DIR/k",
		"REGION_SG_TLS_CERT_FILE": "DIR/tls.pem", "REGION_SG_TLS_KEY_FILE": "DIR/tls.key",
	} {
		environ = append(environ, EnvPrefix+name+"="+strings.ReplaceAll(value, "DIR", s.dir))
	}
	c, err := Load("", environ)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Regions) != 1 || c.Regions[0].ID != "sg" || len(c.PlanTable) != 4 {
		t.Fatalf("%+v", c)
	}
}

func TestRefused(t *testing.T) {
	replace := func(pairs ...string) string { return strings.NewReplacer(pairs...).Replace(whole) }
	for _, c := range []struct {
		name, text string
		environ    []string
		mentions   string
		class      error
	}{
		{name: "not TOML", text: "data_dir = ", mentions: "line 1"},
		{name: "unknown key", text: "surprise = 1\n" + whole, mentions: "surprise"},
		{name: "unknown key below", text: replace("[region.tls]", "[region.tls]\ncertificate = \"x\""), mentions: "region.tls.certificate"},
		{name: "key twice", text: "data_dir = \"x\"\n" + whole, mentions: "line"},
		{name: "wrong type", text: replace("batch_events = 500", "batch_events = \"many\""), mentions: "batch_events"},
		{name: "unknown variable", text: whole, environ: []string{"COFFER_SERVER_REGION_EU_LISTENS=x"}, mentions: "COFFER_SERVER_REGION_EU_LISTENS"},
		{name: "unknown variable 2", text: whole, environ: []string{"COFFER_SERVER_X=x"}, mentions: "COFFER_SERVER_X"},
		{name: "no data_dir", text: replace(`data_dir = "DIR/data"`, ""), mentions: "data_dir"},
		{name: "no operator token", text: replace("operator_token_file = \"DIR/operator.token\"\noperators_file = \"DIR/operators\"", ""), mentions: "operator_token_file"},
		{name: "operators exposed", text: replace("DIR/operators", "DIR/exposed"), mentions: "operators_file", class: auth.ErrSecretExposed},
		{name: "operator token missing", text: replace("operator.token", "none"), mentions: "operator_token_file", class: auth.ErrSecretFile},
		{name: "operator token exposed", text: replace("operator.token", "exposed"), mentions: "0644", class: auth.ErrSecretExposed},
		{name: "TLS key exposed", text: replace("tls.key", "exposed"), mentions: "tls.key_file", class: auth.ErrSecretExposed},
		{name: "TLS key missing", text: replace("tls.key", "none"), mentions: "tls.key_file", class: auth.ErrSecretFile},
		{name: "credentials exposed", text: replace("nats.creds", "exposed"), mentions: "credentials_file", class: auth.ErrSecretExposed},
		{name: "secret in the URL", text: replace("tls://a.example", "tls://user:secret@a.example"), mentions: "holds a secret"},
		{name: "two replicas", text: replace("[region.nats]", "[region.nats]\nreplicas = 2"), mentions: "nats.replicas"},
		{name: "NATS without TLS", text: replace("tls://b", "nats://b"), mentions: "loopback"},
		{name: "NATS settings without a URL", text: replace(`url = "tls://a.example.com:4222,tls://b.example.com:4222"`, ""), mentions: "no url"},
		{name: "plaintext to the world", text: replace(`id = "eu"`, "id = \"eu\"\nplaintext = true"), mentions: "loopback"},
		{name: "keys kept too long", text: replace("[region.nats]", "[region.keys]\noutage = \"25h\"\n[region.nats]"), mentions: "keys.outage"},
		{name: "keys not asked for in time", text: replace("[region.nats]", "[region.keys]\nrevalidate = \"5h\"\n[region.nats]"), mentions: "keys.revalidate"},
		{name: "http", text: replace("https://eu", "http://eu"), mentions: "https"},
		{name: "no TLS", text: replace(`key_file = "DIR/tls.key"`, ""), mentions: "tls.key_file"},
		{name: "no kms", text: replace(`kms = "local:DIR/data/eu.key"`, ""), mentions: "kms"},
		{name: "bad listen", text: replace("0.0.0.0:7443", "0.0.0.0"), mentions: "listen"},
		{name: "bad port", text: replace("0.0.0.0:7443", "0.0.0.0:https"), mentions: "port"},
		{name: "port out of range", text: replace("0.0.0.0:7443", "0.0.0.0:70000"), mentions: "port"},
		{name: "nothing served", text: replace(`listen = "0.0.0.0:7443"`, ""), mentions: "listen"},
		{name: "region twice", text: replace(`id = "us"`, `id = "eu"`), mentions: "twice"},
		{name: "unknown region without a number", text: replace(`id = "us"`, `id = "mars"`), mentions: "number"},
		{name: "region number out of range", text: replace(`id = "us"`, "id = \"mars\"\nnumber = 259"), mentions: "number"},
		{name: "region id", text: replace(`id = "us"`, "id = \"u.s\"\nnumber = 9"), mentions: "region id"},
		{name: "bad plan", text: replace(`retention = "3d"`, `retention = "1m"`), mentions: "retention"},
		{name: "bad duration", text: replace(`retention = "3d"`, `retention = "3 days"`), mentions: "time span"},
		{name: "bad level", text: replace(`"warn"`, `"loud"`), mentions: "log.level"},
		{name: "bad format", text: replace(`"text"`, `"xml"`), mentions: "log.format"},
		{name: "seldom refresh", text: replace("[retention]", "[retention]\nrefresh = \"40d\""), mentions: "refresh"},
		{name: "late warning", text: replace("[retention]", "[retention]\nprofiles = \"20d\""), mentions: "warning"},
		{name: "negative limit", text: replace("batch_events = 500", "batch_events = -1"), mentions: "batch_events"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t)
			s.write("exposed", strings.Repeat("s", 40), 0o644)
			_, err := s.load(c.text, c.environ...)
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("got %v", err)
			}
			if c.class != nil && !errors.Is(err, c.class) {
				t.Errorf("got %v, want %v", err, c.class)
			}
			if !strings.Contains(err.Error(), c.mentions) {
				t.Errorf("%q does not mention %q", err, c.mentions)
			}
			if strings.Contains(err.Error(), "user:secret") || strings.Contains(err.Error(), "ssss") {
				t.Errorf("the error tells a secret: %v", err)
			}
		})
	}
}

// operators reports whether both files' operators are known by their names.
func operators(c Config, dir string) bool {
	for name, file := range map[string]string{OperatorOfToken: "operator.token", "ann": "ann.token"} {
		token, err := auth.ReadSecret(filepath.Join(dir, file))
		if err != nil {
			return false
		}
		if got, ok := c.Operators.Identify(token); !ok || got != name {
			return false
		}
	}
	return true
}
