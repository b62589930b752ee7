package client

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
)

// manifests are a manifest of each format, as a server made them.
func manifests(t testing.TB) []string {
	t.Helper()
	var all []string
	for _, name := range []string{"ndjson.json", "agora.json"} {
		text, err := os.ReadFile("testdata/manifest/" + name)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(text))
	}
	return all
}

func TestParseExportManifest(t *testing.T) {
	for _, text := range manifests(t) {
		m, err := ParseExportManifest([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Files) == 0 || m.Events == 0 || m.Bytes == 0 || m.Through == 0 || len(m.Log) != 32 {
			t.Errorf("parsed to %+v", m)
		}
	}
	text := manifests(t)[0]
	digest := text[strings.Index(text, `"sha256": "`)+len(`"sha256": "`):][:64]
	for name, change := range map[string][2]string{
		"version":      {`"version": 1`, `"version": 2`},
		"format":       {`"format": "ndjson"`, `"format": "csv"`},
		"hours' names": {`"format": "ndjson"`, `"format": "agora"`},
		"path":         {`events-000001.ndjson`, `../events-000001.ndjson`},
		"other name":   {`events-000001.ndjson`, `events-000002.ndjson`},
		"digest":       {digest, strings.Repeat("0", 64)},
		"upper case":   {digest, strings.ToUpper(digest)},
		"sum":          {`"events": 17`, `"events": 18`},
		"position":     {`"through": "`, `"through": "-`},
		"twice":        {`"version": 1,`, `"version": 1, "version": 1,`},
		"cut":          {"}\n", ""},
	} {
		changed := strings.Replace(text, change[0], change[1], 1)
		if changed == text {
			t.Fatalf("%s: nothing to change", name)
		}
		if _, err := ParseExportManifest([]byte(changed)); !errors.Is(err, ErrManifest) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzParseExportManifest: what is accepted has names that stay in a directory, and
// is accepted again when it is written anew.
func FuzzParseExportManifest(f *testing.F) {
	for _, text := range manifests(f) {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := ParseExportManifest(text)
		if err != nil {
			if !errors.Is(err, ErrManifest) {
				t.Fatalf("%v is not ErrManifest", err)
			}
			return
		}
		for _, file := range m.Files {
			if strings.ContainsAny(file.Name, "/\\\x00") || strings.HasPrefix(file.Name, ".") || file.Name == "" {
				t.Fatalf("the name %q", file.Name)
			}
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		n, err := ParseExportManifest(again)
		if err != nil || n.SHA256 != m.SHA256 || len(n.Files) != len(m.Files) {
			t.Fatalf("written anew it is refused: %v", err)
		}
	})
}
