package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/keyserverstest"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/cmd/coffer/internal/residency"
	"github.com/cofferdb/coffer/journal/client"
)

// keyService is a key service that a region's keys are with, and the settings of
// other keys: what the doctor says of each.
type keyService struct {
	setting string
	wrong   map[string]string // setting to words
	place   string            // of the service, in its own words
	home    string            // what is said of the region's place, where it is another one
}

func services(t *testing.T) map[string]func(*testing.T) keyService {
	t.Helper()
	return map[string]func(*testing.T) keyService{
		"vault": func(t *testing.T) keyService {
			v, another := keyserverstest.NewVault(t), keyserverstest.NewVault(t)
			v.NewKey("other")
			v.NewKey("none")
			v.Call("POST", "transit/keys/none/config", map[string]any{"deletion_allowed": true})
			v.Call("DELETE", "transit/keys/none", nil)
			return keyService{setting: v.Setting(), wrong: map[string]string{
				v.SettingOf("other"): "/transit/other: " + unnamedKey,
				v.SettingOf("none"):  "/transit/none: ",
				another.Setting():    "/transit/coffer-eu: " + unnamedKey,
			}}
		},
		"local-kms": func(t *testing.T) keyService {
			home, abroad := keyserverstest.NewAWS(t, "eu-central-1"), keyserverstest.NewAWS(t, "us-east-1")
			return keyService{setting: home.Setting(), place: "eu-central-1", wrong: map[string]string{
				home.In("eu-central-1").Setting(): unnamedKey,
				abroad.Setting():                  "key awskms:arn:aws:kms:us-east-1:",
				// The service is asked for a key of this region, and has it in another.
				strings.Replace(abroad.Setting(), "region=us-east-1", "region=eu-central-1", 1): "the key is in another region",
			}}
		},
		"moto": func(t *testing.T) keyService {
			home := keyserverstest.NewMoto(t, "eu-central-1")
			abroad := home.In("us-east-1")
			return keyService{setting: home.Setting(), place: "eu-central-1", wrong: map[string]string{
				home.In("eu-central-1").Setting(): unnamedKey,
				abroad.Setting():                  "key awskms:arn:aws:kms:us-east-1:",
				strings.Replace(abroad.Setting(), "region=us-east-1", "region=eu-central-1", 1): "/" + abroad.Key + ": ", // not there
			}}
		},
		"moto in another region": func(t *testing.T) keyService {
			return keyService{
				setting: keyserverstest.NewMoto(t, "us-east-1").Setting(), place: "us-east-1",
				home: "it is in us-east-1, the region in eu-central-1",
			}
		},
	}
}

// TestDoctorAsksTheKeyServices: with the configuration the doctor asks the key
// services themselves. Another key, one of another region and one that is not
// there are errors, and so is a manifest that says something else of the same key.
func TestDoctorAsksTheKeyServices(t *testing.T) {
	for name, begin := range services(t) {
		t.Run(name, func(t *testing.T) {
			service := begin(t)
			dir := t.TempDir()
			token := auth.NewOperatorToken()
			if err := os.WriteFile(filepath.Join(dir, "operator.token"), []byte(token), 0o600); err != nil {
				t.Fatal(err)
			}
			write := func(name, setting string) string {
				path := filepath.Join(dir, name)
				text := strings.NewReplacer("DIR", dir, "KMS", setting).Replace(`
data_dir = "DIR/data"
operator_token_file = "DIR/operator.token"
[[region]]
id = "eu"
listen = "127.0.0.1:0"
plaintext = true
kms = "KMS"
`)
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				return path
			}
			file := write("coffer.toml", service.setting)
			doctor := doctorOf(t, file, token)
			if service.home != "" {
				if out := doctor(ExitFailure); !strings.Contains(out, service.home) {
					t.Errorf("its keys are elsewhere, and it says\n%s", out)
				}
				return
			}
			if out := doctor(ExitOK, "--config", file); !strings.Contains(out, "ok       servers") || !strings.Contains(out, "and 1 keys") || strings.Contains(out, "was not asked") {
				t.Errorf("all is well, and it says\n%s", out)
			}
			for setting, words := range service.wrong {
				out := doctor(ExitFailure, "--config", write("wrong.toml", setting))
				if !strings.Contains(out, words) || !strings.Contains(out, "1 differences from the manifest") || !strings.Contains(out, "was not asked") {
					t.Errorf("%s: it does not say %q\n%s", setting, words, out)
				}
			}
			cfg, err := config.Load(file, nil)
			if err != nil {
				t.Fatal(err)
			}
			found, err := node.Survey(t.Context(), cfg, cfg.Regions[0], nil)
			if err != nil || len(found.Keys) != 1 || found.Keys[0].Region != service.place || found.Keys[0].State != "enabled" {
				t.Fatalf("%+v, %v", found, err)
			}
			m, _, err := fetchManifest(t.Context(), client.Config{URL: os.Getenv("COFFER_URL"), OperatorToken: client.StaticToken(token)}, "")
			if err != nil || len(residency.CompareKeys(m, found.Keys)) != 0 {
				t.Fatalf("%+v, %v", m.Keys, err)
			}
			for words, change := range map[string]func(*residency.Key){
				`the manifest says region "us-west-2", the service "` + service.place + `"`: func(k *residency.Key) { k.Region = "us-west-2" },
				"the manifest says disabled, the service enabled":                           func(k *residency.Key) { k.State = "disabled" },
				unnamedKey: func(k *residency.Key) { k.Key += "x" },
			} {
				lie := m
				lie.Keys = []residency.Key{m.Keys[0]}
				change(&lie.Keys[0])
				if got := residency.CompareKeys(lie, found.Keys); len(got) != 1 || !strings.Contains(got[0].Detail, words) {
					t.Errorf("of another manifest: %v, want %q", got, words)
				}
			}
		})
	}
}

const unnamedKey = "it is configured, and the manifest does not name it"
