package compose

import (
	"go/version"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/types"
	natsserver "github.com/nats-io/nats-server/v2/server"
)

const module = "github.com/cofferdb/coffer"

// root is the top of the repository, as seen from this package's folder, which is
// where the go command runs its tests.
const root = "../../../../.."

// oneShot names the services that run to their end before others start.
var oneShot = map[string]bool{"setup": true, "vault-setup": true}

// compose loads docker-compose.yml as Docker's own tools do, with no variable of
// this machine.
func compose(t *testing.T) *types.Project {
	t.Helper()
	top, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	project, err := loader.LoadWithContext(t.Context(), types.ConfigDetails{
		WorkingDir:  top,
		ConfigFiles: []types.ConfigFile{{Filename: filepath.Join(top, "docker-compose.yml")}},
		Environment: types.Mapping{},
	})
	if err != nil {
		t.Fatal(err)
	}
	return project
}

func TestComposeFile(t *testing.T) {
	project := compose(t)
	for _, name := range []string{"setup", "nats", "vault", "vault-setup", "coffer"} {
		if _, ok := project.Services[name]; !ok {
			t.Errorf("no service %s", name)
		}
	}
	pinned := regexp.MustCompile(`^[a-z0-9./-]+:(\d+\.\d+\.\d+[a-z0-9.-]*|local)$`)
	for name, service := range project.Services {
		if !pinned.MatchString(service.Image) {
			t.Errorf("%s: image %q names no full version", name, service.Image)
		}
		if oneShot[name] {
			if service.HealthCheck != nil || service.Restart != "" {
				t.Errorf("%s runs once: no health check, no restart", name)
			}
		} else {
			if service.HealthCheck == nil || len(service.HealthCheck.Test) == 0 {
				t.Errorf("%s has no health check", name)
			}
			if service.Restart != "unless-stopped" {
				t.Errorf("%s does not come back after a crash", name)
			}
		}
		for variable, value := range service.Environment {
			if value != nil && regexp.MustCompile(`(?i)pass|secret|token|key`).MatchString(variable) && !strings.HasPrefix(*value, "/") {
				t.Errorf("%s: %s holds a secret; secrets come by file", name, variable)
			}
		}
		for other, dependency := range service.DependsOn {
			want := types.ServiceConditionHealthy
			if oneShot[other] {
				want = types.ServiceConditionCompletedSuccessfully
			}
			if dependency.Condition != want {
				t.Errorf("%s waits for %s to be %s, want %s", name, other, dependency.Condition, want)
			}
		}
		for _, port := range service.Ports {
			if port.HostIP != "127.0.0.1" {
				t.Errorf("%s: port %s is open to the network", name, port.Published)
			}
		}
		for _, volume := range service.Volumes {
			if volume.Type != types.VolumeTypeBind {
				continue
			}
			if info, err := os.Stat(volume.Source); err != nil || !info.Mode().IsRegular() {
				t.Errorf("%s: mounts %s, which is no file of the repository", name, volume.Source)
			}
			if !volume.ReadOnly {
				t.Errorf("%s: may write to %s", name, volume.Source)
			}
		}
		if service.Build == nil {
			continue
		}
		dockerfile, err := os.ReadFile(filepath.Join(service.Build.Context, service.Build.Dockerfile))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if stage := " AS " + service.Build.Target + "\n"; !strings.Contains(string(dockerfile), stage) {
			t.Errorf("%s: the Dockerfile has no stage %s", name, service.Build.Target)
		}
	}
	// What a server may read is its own.
	for name, service := range project.Services {
		for _, volume := range service.Volumes {
			owner, secret := strings.CutSuffix(volume.Source, "-secrets")
			if volume.Source == "authority" && !oneShot[name] || secret && name != owner && !oneShot[name] {
				t.Errorf("%s mounts %s", name, volume.Source)
			}
			if secret && name == owner && !volume.ReadOnly {
				t.Errorf("%s may write to %s", name, volume.Source)
			}
		}
	}
}

// TestDockerfile holds its base images to full versions, and to a Go that can build
// the module.
func TestDockerfile(t *testing.T) {
	dockerfile, err := os.ReadFile(filepath.Join(root, "cmd/coffer/Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	gomod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	needed := regexp.MustCompile(`(?m)^go (\d+\.\d+\.\d+)$`).FindSubmatch(gomod)
	if needed == nil {
		t.Fatal("go.mod names no full Go version")
	}
	golang := regexp.MustCompile(`^golang:(\d+\.\d+\.\d+)-bookworm$`)
	for _, from := range regexp.MustCompile(`(?m)^FROM (\S+)`).FindAllStringSubmatch(string(dockerfile), -1) {
		if from[1] == "scratch" {
			continue
		}
		m := golang.FindStringSubmatch(from[1])
		if m == nil || version.Compare("go"+m[1], "go"+string(needed[1])) < 0 {
			t.Errorf("base image %s, want golang:VERSION-bookworm, at least %s", from[1], needed[1])
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^COPY (?:--\S+ )*(\S+)`).FindAllStringSubmatch(string(dockerfile), -1) {
		if strings.HasPrefix(m[1], "/") { // from another stage
			continue
		}
		if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
			t.Error(err)
		}
	}
}

// natsConf is the file that compose mounts.
const natsConf = "docs/operations/compose/nats.conf"

// TestNATSConfiguration reads the published file with the server's own parser: an
// acknowledgement means the disk only while this holds.
func TestNATSConfiguration(t *testing.T) {
	dir := topologyDir(t)
	options := &natsserver.Options{}
	if err := options.ProcessConfigFile(filepath.Join(dir, "etc/nats/nats.conf")); err != nil {
		t.Fatal(err)
	}
	switch {
	case !options.SyncAlways:
		t.Error("JetStream does not sync before it acknowledges")
	case !options.JetStream || options.JetStreamMaxStore <= 0:
		t.Error("JetStream is off or unbounded")
	case options.TLSConfig == nil:
		t.Error("no TLS")
	case len(options.Users) != 1 || options.Users[0].Password == "":
		t.Error("the server asks for no password")
	}
}

// TestPolicyIsOne holds three copies of Vault's policy to one text: the file that
// compose uses, the page for operators, and what the provider's tests run with.
func TestPolicyIsOne(t *testing.T) {
	rules := func(name string) []string {
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		// The operator's rules, below the others, are of other paths.
		return regexp.MustCompile(`(?m)^path "transit/(?:datakey|encrypt|decrypt|rewrap)[^\n]*|^path "transit/keys/coffer-eu" [^\n]*`).FindAllString(string(text), -1)
	}
	want := rules("docs/operations/compose/coffer-policy.hcl")
	if len(want) != 5 {
		t.Fatalf("the policy has %d rules: %q", len(want), want)
	}
	for _, name := range []string{"docs/operations/keys-setup.md", "kms/vault/server_test.go"} {
		if got := rules(name); !slices.Equal(got, want) {
			t.Errorf("%s has the policy\n%s\nwant\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}
